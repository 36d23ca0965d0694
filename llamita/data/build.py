"""From documents to a corpus folder: drop exact duplicates, hold some documents out, encode, write shards."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llamita.data.read import Document
from llamita.data.shards import TOKEN, VERSION, Manifest, Writer, replacing
from llamita.tokenizer import Tokenizer
from llamita.tokenizer.carried import AnyTokenizer

if TYPE_CHECKING:
    from llamita.tokenizer.bulk import Bulk

BATCH_BYTES = 4 * 2**20
BULK_BYTES = 32 * 2**20  # of text: from here on the fast encoder is worth the 2 s that it takes to make one
MAX_NAMES = 2**16

Progress = Callable[[int, int, int], None]


class Item(NamedTuple):
    document: Document
    digest: bytes
    num_bytes: int


class Names(dict[str, int]):
    """Numbers names in the order in which they are first asked for."""

    def __missing__(self, name: str) -> int:
        if len(self) == MAX_NAMES:
            raise ValueError(f"more than {MAX_NAMES:,} sources or languages, at {name!r}; give the rows fewer")
        self[name] = len(self)
        return self[name]


class Unique(Iterator[Item]):
    """Each text that is not empty once, told apart by 128-bit hashes; `num_duplicates` counts the rest."""

    def __init__(self, docs: Iterable[Document]):
        self.num_duplicates = 0
        self._items = self._each(docs)

    def __next__(self) -> Item:
        return next(self._items)

    def _each(self, docs: Iterable[Document]) -> Iterator[Item]:
        seen: set[bytes] = set()
        for document in docs:
            data = document.text.encode()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if digest in seen:
                self.num_duplicates += 1
            elif data:
                seen.add(digest)
                yield Item(document, digest, len(data))


def split(items: Iterable[Item], heldout_share: float, seed: int) -> Iterator[tuple[str, Item]]:
    """Says for each document whether it is "train" or "heldout", by a keyed hash of its text and nothing
    else.

    So a document keeps its place when others are added. One exception keeps both splits from being empty: as
    long as all documents fell to one side, the one whose hash lies nearest to the border waits, and if no
    document has come for the other side at the end, it goes there. A single document is trained on.
    """
    border = int(heldout_share * 2**64)
    sides: set[str] = set()
    nearest: tuple[int, Item] | None = None
    num_items = 0
    for item in items:
        num_items += 1
        keyed = hashlib.blake2b(item.digest, digest_size=8, key=str(seed).encode())
        distance = int.from_bytes(keyed.digest(), "little") - border
        side = "heldout" if distance < 0 else "train"
        if len(sides | {side}) == 2:
            if nearest:
                yield next(iter(sides)), nearest[1]
                nearest = None
            yield side, item
        elif nearest and abs(distance) >= nearest[0]:
            yield side, item
        else:
            if nearest:
                yield side, nearest[1]
            nearest = abs(distance), item
        sides.add(side)
    if nearest:
        yield "heldout" if num_items > 1 and sides == {"train"} else "train", nearest[1]


def batched(pairs: Iterable[tuple[str, Item]]) -> Iterator[list[tuple[str, Item]]]:
    """Lists of at least BATCH_BYTES of text, and the rest."""
    batch: list[tuple[str, Item]] = []
    num_bytes = 0
    for pair in pairs:
        batch.append(pair)
        num_bytes += pair[1].num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def encoded(
    batch: list[tuple[str, Item]], tokenizer: AnyTokenizer, bulk: "Bulk | None"
) -> Iterable[Sequence[int] | np.ndarray]:
    """The ids of each document, the same from either encoder."""
    texts = [item.document.text for _, item in batch]
    if bulk is None:
        return tokenizer.encode_batch(texts)
    ids, lengths = bulk.encode(texts)
    return np.split(ids, np.cumsum(lengths)[:-1])


def build(
    docs: Iterable[Document],
    tokenizer: AnyTokenizer,
    out: str | Path,
    *,
    heldout_share: float = 0.05,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Manifest:
    """Writes the corpus folder `out`, in place of a corpus that may be there; same input, same bytes.

    The tokenizer is saved beside the shards. Each document is BOS (EOS where texts have no BOS), its ids, EOS.
    `on_progress` is told after
    every batch how many documents, UTF-8 bytes and tokens have been written. Raises ValueError: no text, or a
    share that is not between 0 and 1.
    """
    if not 0 < heldout_share < 1:
        raise ValueError(f"the held-out share must lie between 0 and 1, both excluded, not {heldout_share}")
    unique, sources, langs = Unique(docs), Names(), Names()
    num_docs = num_bytes = num_tokens = 0
    with replacing(Path(out)) as folder, ExitStack() as stack:
        tokenizer.save(folder / "tokenizer")
        writer, bulk = Writer(folder, stack), None
        first = tokenizer.bos_id if tokenizer.adds_bos else tokenizer.eos_id
        for batch in batched(split(unique, heldout_share, seed)):
            if num_bytes >= BULK_BYTES and bulk is None and isinstance(tokenizer, Tokenizer):
                from llamita.tokenizer.bulk import Bulk

                bulk = Bulk(tokenizer)
            for (side, item), text_ids in zip(batch, encoded(batch, tokenizer, bulk), strict=True):
                ids = np.concatenate([[first], text_ids, [tokenizer.eos_id]]).astype(TOKEN)
                assert ids.max() < tokenizer.vocab_size, f"{item.document.name}: an id beyond the vocabulary"
                doc_id = int.from_bytes(item.digest[:8], "little")
                document = item.document
                writer.add(side, ids, item.num_bytes, doc_id, langs[document.lang], sources[document.source])
                num_docs += 1
                num_bytes += item.num_bytes
                num_tokens += len(ids)
            if on_progress:
                on_progress(num_docs, num_bytes, num_tokens)
        if num_docs == 0:
            raise ValueError("there is no text to build a corpus from")
        manifest = Manifest(
            VERSION,
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            TOKEN.str,
            seed,
            heldout_share,
            unique.num_duplicates,
            list(sources),
            list(langs),
            writer.close(),
        )
        (folder / "manifest.json").write_text(manifest.to_json())
    return manifest
