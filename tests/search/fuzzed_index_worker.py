"""Opens an index with forged manifests, and asks the server for nonsense, in at most 1 GiB more than it starts with.

Usage: INDEX SEED ROUNDS. An error that is not documented ends it with a traceback. Prints, as JSON, how many of each
kind were refused and how many went through, which must find what the index finds.
"""

import json
import random
import re
import resource
import string
import sys
from pathlib import Path

from starlette.testclient import TestClient

from st_kdmcse.files import manifest_checksum
from st_kdmcse.search import SemanticIndex
from st_kdmcse.search.limits import Limits
from st_kdmcse.search.server import create_app
from st_kdmcse.search.storage import read_index

JUNK = [None, True, 0, -1, 2**31, 2**63, 10**400, 1.5, 1e308, float("nan"), "", "..", "/", "\0", "\ud800", "a" * 5000]
JUNK += [[], {}, [[]], [0.5], {"": ""}, {"bytes": -1}, "Flat", "IVF65536,PQ8", "../../etc/passwd", "data-0", ["a"] * 99]
PIECES = ["year", "yaer", "=", "!=", ">=", "<", "=>", "[", "]", "{", '"', "\\", "1e999", "9" * 25, "null", "True", ","]
PIECES += ["\0", "é", "🐕", "\ud800", "%", "&", "#", " ", "\n", "dog", "-1", "nan", "'", ";", "--", "*", "x" * 700]


def places(content, path=()):
    """The way to each value of a manifest."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content[:3]):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def forged(written, choose):
    manifest = json.loads(written)
    for _ in range(choose.randint(1, 3)):
        *way, last = choose.choice(list(places(manifest)))
        inner = manifest
        for key in way:
            inner = inner[key]
        act = choose.random()
        if act < 0.2 and isinstance(inner, dict):
            del inner[last]
        elif act < 0.3 and isinstance(inner, dict):
            inner[choose.choice(string.ascii_letters)] = choose.choice(JUNK)
        else:
            inner[last] = choose.choice(JUNK)
    if choose.random() < 0.95:
        manifest["checksum"] = manifest_checksum(manifest)
    text = json.dumps(manifest).encode()
    if choose.random() < 0.1:
        place = choose.randrange(len(text))
        text = text[:place] + bytes([choose.randrange(256)]) + text[place + choose.randrange(20) :]
    return text


def fuzz_manifests(folder, rounds, choose):
    file = folder / "manifest.json"
    written, counts = file.read_bytes(), {"refused": 0, "read": 0}
    vectors = read_index(folder)[0].index.reconstruct_n(0, 3)
    expected = read_index(folder)[0].search(vectors, 5)
    model = SemanticIndex.load(folder).model
    for number in range(rounds):
        file.write_bytes(forged(written, choose))
        try:
            backend, _ = read_index(folder)
            assert backend.search(vectors, 5) == expected
            backend.info()
            if number % 10 == 0:
                SemanticIndex.load(folder, model).info()
            counts["read"] += 1
        except (ValueError, OSError):
            counts["refused"] += 1
    file.write_bytes(written)
    return counts


def fuzz_requests(folder, rounds, choose):
    counts = {}
    limits = Limits(requests_per_minute=1_000_000)
    with TestClient(create_app(SemanticIndex.load(folder), limits=limits)) as client:
        for _ in range(rounds):
            text = ["".join(choose.choices(PIECES, k=choose.randint(0, 6))) for _ in range(4)]
            text = [each.encode(errors="replace") if choose.random() < 0.9 else b"\xff\xfe" for each in text]
            names = choose.choices(["q", "k", "filter", "id", "x"], k=4)
            path = choose.choice(["/api/search", "/api/search", "/api/info", "/thumbnail", "/", "/api/%00"])
            coded = ["".join(f"%{byte:02x}" for byte in each) for each in text]
            asked = "&".join(f"{name}={each}" for name, each in zip(names, coded, strict=True))
            response = client.request(choose.choice(["GET", "GET", "HEAD", "POST"]), f"{path}?{asked}")
            assert response.status_code < 500, (asked, response.text)
            counts[str(response.status_code)] = counts.get(str(response.status_code), 0) + 1
    return counts


if __name__ == "__main__":
    folder, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    requests = fuzz_requests(folder, 3, random.Random(seed))  # so that all is loaded
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
    found = fuzz_manifests(folder, rounds, random.Random(seed))
    found["requests"] = fuzz_requests(folder, rounds, random.Random(seed))
    sys.stdout.write(json.dumps(found))
