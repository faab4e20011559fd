"""What someone does who changes a bundle on purpose."""

from __future__ import annotations

import json
from pathlib import Path

from packager.io.files import dump_json, sha256_file, sha256_json


def sign(root: Path) -> None:
    """All hashes and sums made right again, as someone would who changes a bundle on purpose."""
    path = root / "packager.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        entry.update(bytes=(root / entry["path"]).stat().st_size, sha256=sha256_file(root / entry["path"]))
    manifest["bundle_sha256"] = sha256_json(manifest["files"])
    path.write_text(dump_json(manifest))
    lines = [f"{entry['sha256']}  {entry['path']}\n" for entry in manifest["files"]]
    (root / "SHA256SUMS").write_text("".join(lines) + f"{sha256_file(path)}  packager.json\n")
