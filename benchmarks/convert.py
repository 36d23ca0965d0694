"""Convert a synthetic checkpoint of a preset's shape, Hugging Face -> Meta -> Hugging Face, proved at each step.

Each conversion runs in a process of its own; peak memory is that process's resident set, pages of mapped files
included. Beside it, the same bytes copied by `cp` and synced. GB/s counts the bytes of the weights once. Weights are
one block of random bf16 numbers again and again, which no step can tell from trained ones. Writes one JSON row.

    python benchmarks/convert.py --shape llama3.1-8b --work FOLDER
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch

from llamita import runtime
from llamita.formats import hf
from llamita.formats.files import replacing
from llamita.formats.weights import Weights, sizes
from llamita.model.shape import PRESETS, preset
from llamita.tokenizer import Tokenizer

BLOCK = 1 << 20

CONVERT = """
import json, resource, sys, time
from pathlib import Path
from llamita.formats import proof
from llamita.recipes import convert
spent = {}
def timed(name, function):
    def run(*args, **named):
        began = time.perf_counter()
        result = function(*args, **named)
        spent[name] = time.perf_counter() - began
        return result
    return run
convert._write = timed("write", convert._write)
convert.prove = timed("prove", convert.prove)
began = time.perf_counter()
proof = convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), form=sys.argv[3])
spent["whole"] = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": spent, "peak_gib": peak, "equal_tensors": proof["readers"]["llamita"]["equal_tensors"]}))
"""


def synthetic(shape_name: str, folder: Path) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    shape = preset(shape_name)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()

    def load(name: str) -> torch.Tensor:
        size = sizes(shape)[name]
        count = torch.Size(size).numel()
        start = zlib.crc32(name.encode()) % BLOCK  # so that no two tensors are alike
        return block.repeat(-(-(count + start) // BLOCK))[start : start + count].view(size)

    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    with replacing(folder) as new:
        hf.write(Weights(shape, dict.fromkeys(sizes(shape), "BF16"), load), tokenizer, new, "BF16")
    return 2 * shape.num_params


def copied(source: Path, target: Path) -> float:
    """Seconds that a plain copy of the weights takes until it is on disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def converted(source: Path, target: Path, form: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(source), str(target), form], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="llama3.1-8b", choices=PRESETS)
    parser.add_argument("--work", type=Path, required=True, help="folder with room for three copies of the weights")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/convert.json")
    args = parser.parse_args()
    first, second, third = (args.work / name for name in ("hf", "meta", "hf_again"))
    num_bytes = synthetic(args.shape, first)
    files = [path.name for path in first.iterdir() if path.suffix == ".safetensors"]
    row = {
        "command": " ".join([Path(sys.argv[0]).name, "--shape", args.shape]),
        "machine": runtime.machine(),
        "bytes": num_bytes,
        "shards": len(files),
        "copy_seconds": copied(first, args.work / "copy"),
        "hf to meta": converted(first, second, "meta"),
    }
    row["meta to hf"] = converted(second, third, "hf")
    row["bit_identical"] = all(
        subprocess.run(["cmp", "-s", str(first / name), str(third / name)]).returncode == 0 for name in files
    )
    row["copy_seconds_again"] = copied(first, args.work / "copy")
    for name in ("hf to meta", "meta to hf"):
        row[name]["write_gb_per_second"] = num_bytes / 1e9 / row[name]["seconds"]["write"]
    row["copy_gb_per_second"] = num_bytes / 1e9 / min(row["copy_seconds"], row["copy_seconds_again"])
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    for folder in (first, second, third):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
