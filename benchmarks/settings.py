"""What the runtime's settings do to a bundle's peak memory and speed: each setting alone, beside the bundle as built.

    python benchmarks/settings.py --bundle BUNDLE [--new 32] [--repeats 3] [--json FILE]

Every run is a fresh process that loads the bundle, fills its longest prompt and decodes; settings take turns, the
highest peak and the best speed of each count. A setting that the runtime refuses is a row that says so. Speeds mean
nothing on a busy machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import DECODE, PREFILL, ProbeRun, best, make_parser, show, write_figures

from packager.bundle.folder import BundleFolder
from packager.bundle.opening import open_bundle
from packager.io.files import read_json
from packager.sizes import format_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Changes to `search`, to the session and run options, and to the environment; `threads` 0 leaves the number."""

    search: Mapping[str, Any] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0


SETTINGS: dict[str, Setting] = {
    "as built": Setting(),
    **{f"chunk_size {size}": Setting(search={"chunk_size": size}) for size in (16, 32, 64, 128, 256, 512)},
    "the prompt in one piece": Setting(search={"chunk_size": 0}),
    "past_present_share_buffer false": Setting(search={"past_present_share_buffer": False}),
    "enable_cpu_mem_arena false": Setting(session={"enable_cpu_mem_arena": False}),
    "enable_mem_pattern false": Setting(session={"enable_mem_pattern": False}),
    "enable_mem_pattern true": Setting(session={"enable_mem_pattern": True}),
    "arena shrinkage after every run": Setting(run={"memory.enable_memory_arena_shrinkage": "cpu:0"}),
    "session.disable_prepacking 1": Setting(session={"session.disable_prepacking": "1"}),
    "session.use_device_allocator_for_initializers 1": Setting(
        session={"session.use_device_allocator_for_initializers": "1"}
    ),
    "session.prepack.enable_parallel 0": Setting(session={"session.prepack.enable_parallel": "0"}),
    "session.intra_op.allow_spinning 0": Setting(session={"session.intra_op.allow_spinning": "0"}),
    "graph_optimization_level ORT_ENABLE_BASIC": Setting(session={"graph_optimization_level": "ORT_ENABLE_BASIC"}),
    "MALLOC_ARENA_MAX 1": Setting(environment={"MALLOC_ARENA_MAX": "1"}),
    "MALLOC_MMAP_THRESHOLD_ 128 KiB": Setting(environment={"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}),
    "MALLOC_MMAP_THRESHOLD_ 32 MiB": Setting(environment={"MALLOC_MMAP_THRESHOLD_": str(1 << 25)}),
    "one thread": Setting(threads=1),
    "four threads": Setting(threads=4),
}


def changed(bundle: BundleFolder, setting: Setting, folder: Path) -> None:
    """The bundle in `folder`: links to its files, and a configuration of its own."""
    folder.mkdir()
    for path in bundle.root.iterdir():
        if path != bundle.genai_config:
            (folder / path.name).symlink_to(path.resolve())
    config = read_json(bundle.genai_config)
    config["search"] |= setting.search
    decoder = config["model"]["decoder"]
    decoder["session_options"] |= setting.session
    if setting.run:
        decoder["run_options"] = dict(setting.run)
    BundleFolder(root=folder).genai_config.write_text(json.dumps(config), encoding="utf-8")


def main() -> None:
    parser = make_parser(__doc__, threads=2, repeats=3, json=None)
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle, from 'packager build'")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode (default: 32)")
    arguments = parser.parse_args()

    bundle = open_bundle(arguments.bundle)
    bounds, text = bundle.manifest.bounds, bundle.folder.reference.held_out().windows.reshape(-1)
    found: dict[str, list[dict[str, float] | str]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as scratch:
        (ids := Path(scratch, "ids.json")).write_text(
            json.dumps(np.resize(text, bounds.context_tokens - arguments.new).tolist()), encoding="utf-8"
        )
        for number in range(arguments.repeats):
            for at, (name, setting) in enumerate(SETTINGS.items()):
                folder = Path(scratch, str(at))
                if not number:
                    changed(bundle.folder, setting, folder)
                run = ProbeRun(path=folder, new=arguments.new, threads=setting.threads or arguments.threads)
                found[name].append(outcome := run.start(ids, setting.environment))
                print(f"run {number + 1}: {name}: {outcome}", flush=True)
    rows, data = [], []
    first: dict[str, float] = {}
    for name, runs in found.items():
        refusal = next((item for item in runs if isinstance(item, str)), None)
        if refusal is not None:
            rows.append([name, f"refused: {refusal}", "", "", ""])
            data.append({"name": name, "failed": True})
            continue
        figures = best([item for item in runs if isinstance(item, dict)])
        first = first or figures
        more = (figures["peak_bytes"] - first["peak_bytes"]) / 2**20
        speeds = (f"{figures[key]:.0f}" for key in (PREFILL, DECODE))
        rows.append([name, format_size(figures["peak_bytes"]), f"{more:+.1f}", *speeds])
        data.append({"name": name, "failed": False} | figures)
    title = (
        f"{arguments.bundle.name}: context {bounds.context_tokens}, {arguments.threads} threads, "
        f"{arguments.repeats} fresh processes each"
    )
    show(title, ["setting", "peak", "over as built, MiB", "prefill, tokens/s", "decode, tokens/s"], rows)
    write_figures(arguments.json, data)


if __name__ == "__main__":
    main()
