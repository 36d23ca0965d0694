"""Documents that are the same: by hash, by address, nearly; pairs, clusters, and which one stays."""

from collections.abc import Sequence
from typing import Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
from numba import njit

from llamita.data.minhash import similarity
from llamita.data.strings import Strings

# Names of parameters that say who came, not what is shown; `ref` and `id` may say either and stay.
TRACKING = {"fbclid", "gclid", "msclkid", "mc_cid", "mc_eid", "sessionid", "phpsessid", "jsessionid"}
ROUNDS = 8
BLOCK = 2**14


class Rows(Protocol):
    def __getitem__(self, numbers: np.ndarray) -> np.ndarray: ...


def exact_hashes(strings: Strings) -> np.ndarray:
    """XXH3 of the bytes, uint64 [len], never 0. Of 15 billion documents about 6 would meet another's hash by chance."""
    from xxhash import xxh3_64_intdigest

    return np.array([xxh3_64_intdigest(strings[i]) or 1 for i in range(len(strings))], np.uint64)


def name_hashes(names: Sequence[str]) -> np.ndarray:
    """XXH3 of each name, uint64 [len]; 0 for none."""
    from xxhash import xxh3_64_intdigest

    known: dict[str, int] = {"": 0}
    for name in names:
        if name not in known:
            known[name] = xxh3_64_intdigest(name.encode()) or 1
    return np.array([known[name] for name in names], np.uint64)


def url_hashes(urls: Sequence[str]) -> np.ndarray:
    """Hashes of addresses without what does not change the page, uint64 [len]; 0 for none."""
    return name_hashes([normalized(url) for url in urls])


def normalized(url: str) -> str:
    """Host in lower case without `www.` and port, path without a slash at its end, query without tracking.

    `#place` goes, `#!/page` stays: by it some sites tell their pages apart.
    """
    if not url:
        return ""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        host = (parts.hostname or "").removeprefix("www.")
        port = f":{parts.port}" if parts.port not in (None, 80, 443) else ""
    except ValueError:
        return url
    query = sorted((key, value) for key, value in parse_qsl(parts.query, keep_blank_values=True)
                   if not key.lower().startswith("utm_") and key.lower() not in TRACKING)  # fmt: skip
    page = f"#{parts.fragment}" if parts.fragment.startswith("!") else ""
    return f"{host}{port}{parts.path.rstrip('/')}" + (f"?{urlencode(query)}" if query else "") + page


def scoped(hashes: np.ndarray, scopes: np.ndarray) -> np.ndarray:
    """Hashes that are equal only within a scope (scope hash 0 changes nothing)."""
    return np.where(scopes == 0, hashes, hashes ^ (scopes * np.uint64(0x9E3779B97F4A7C15)))


def same(hashes: np.ndarray) -> np.ndarray:
    """Pairs (first, other) of places with equal hashes, int64 [E, 2]: each place with the first of its hash."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    fresh = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    first = order[np.flatnonzero(fresh)][np.cumsum(fresh) - 1]
    return np.stack([first[~fresh], order[~fresh]], axis=1).astype(np.int64).reshape(-1, 2)


def verified(edges: np.ndarray, sketches: Rows, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The pairs whose Jaccard similarity by their sketches is at least `threshold`, and it, float32.

    Members of a group that are not like its first document are compared with the first among themselves, ROUNDS times
    at most: that two are not like a third says nothing of the two.
    """
    kept, alike = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for _ in range(ROUNDS):
        found = similarities(edges, sketches)
        good = found >= threshold
        kept.append(edges[good])
        alike.append(found[good])
        centre, member = edges[~good].T
        edges = member[same(centre.astype(np.uint64))]
        if not len(edges):
            break
    return np.concatenate(kept), np.concatenate(alike)


def similarities(edges: np.ndarray, sketches: Rows) -> np.ndarray:
    """Of each pair, float32 [E]; BLOCK pairs are held in memory at once."""
    blocks = [edges[start : start + BLOCK] for start in range(0, len(edges), BLOCK)]
    found = [similarity(sketches[block[:, 0]], sketches[block[:, 1]]) for block in blocks]
    return np.concatenate([np.empty(0, np.float32), *found])


@njit(cache=True, nogil=True)
def _united(root, edges):
    for i in range(len(edges)):
        a, b = edges[i, 0], edges[i, 1]
        while root[a] != a:
            root[a] = root[root[a]]
            a = root[a]
        while root[b] != b:
            root[b] = root[root[b]]
            b = root[b]
        if a < b:
            root[b] = a
        else:
            root[a] = b
    for i in range(len(root)):
        root[i] = root[root[i]]


def clusters(num_docs: int, edges: np.ndarray) -> np.ndarray:
    """The smallest number of each document's cluster, int64 [num_docs]: 8 bytes a document."""
    root = np.arange(num_docs)
    _united(root, edges)
    return root


def keep(root: np.ndarray, policy: str, sizes: np.ndarray, dates: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Which of the documents that are `alive` stay, bool [n]: one a cluster, by `policy` ("first", "longest",
    "newest"), the first where they are equal."""
    wanted = {"first": np.zeros(len(root), np.int64), "longest": -sizes, "newest": -dates}[policy]
    places = np.flatnonzero(alive)
    order = places[np.lexsort((places, wanted[places], root[places]))]
    fresh = np.concatenate([[True], root[order][1:] != root[order][:-1]])[: len(order)]
    stays = np.zeros(len(root), bool)
    stays[order[fresh]] = True
    return stays
