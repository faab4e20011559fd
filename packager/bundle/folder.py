"""The folder of a bundle: every path in it and what each file is for, spelled here and nowhere else.

genai_config.json  config.json  generation_config.json  tokenizer files  chat_template.jinja
onnx/model_q4.onnx  onnx/model_q4.onnx_data     the graph and its weights
packager.json                                   manifest: files, sources, options, predicted and measured
plan.json  profile.toml  reference.safetensors  how it was made, and the vectors a torch reference needs
golden.safetensors  check.py                    the device's acceptance test
report.json  report.html                        what validation measured
README.md  LICENSE  SHA256SUMS

check.py runs on devices that have no packager: it alone spells for itself what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packager.graph.names import GENAI_FILE
from packager.io.outputs import Artefact
from packager.planning.plan import PLAN_FILE
from packager.scoremap.reference import REFERENCE_FILE, ReferenceFile

MANIFEST_FILE = "packager.json"
GRAPH_FILE = "onnx/model_q4.onnx"
WEIGHTS_FILE = f"{GRAPH_FILE}_data"
GOLDEN_FILE = "golden.safetensors"
CHECK_FILE = "check.py"
CONFIG_FILE = "config.json"
SUMS_FILE = "SHA256SUMS"
REPORT_FILE, REPORT_PAGE = "report.json", "report.html"
UNLISTED = frozenset({MANIFEST_FILE, SUMS_FILE, REPORT_FILE, REPORT_PAGE})
"""Files that the manifest does not list: itself, the sums over it, and what is measured of the rest."""
BUNDLE = Artefact(
    noun="bundle",
    marker=MANIFEST_FILE,
    keys=("files",),
    listed=lambda manifest: [entry["path"] for entry in manifest["files"]],
    known=UNLISTED,
)
"""What tells a bundle from other folders."""
GRAPH, WEIGHTS, REFERENCE, CONFIG = "graph", "weights", "reference", "config"
REQUIRED_ROLES = (GRAPH, WEIGHTS, REFERENCE, CONFIG)
_ROLES = {
    GRAPH_FILE: GRAPH,
    WEIGHTS_FILE: WEIGHTS,
    GOLDEN_FILE: "golden",
    REFERENCE_FILE: REFERENCE,
    CHECK_FILE: "check",
    PLAN_FILE: "plan",
    CONFIG_FILE: CONFIG,
}


def role_of(path: str) -> str:
    """What the file at a path within a bundle is for; "side" for what the map brings along."""
    return _ROLES.get(path, "side")


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleFolder:
    """The paths of a bundle in folder `root`, whole or being written."""

    root: Path

    @property
    def manifest(self) -> Path:
        """See `manifest.Manifest`."""
        return self.root / MANIFEST_FILE

    @property
    def graph(self) -> Path:
        """The graph, whose weights lie in `weights`."""
        return self.root / GRAPH_FILE

    @property
    def weights(self) -> Path:
        """The graph's external data."""
        return self.root / WEIGHTS_FILE

    @property
    def genai_config(self) -> Path:
        """The runtime's configuration."""
        return self.root / GENAI_FILE

    @property
    def config(self) -> Path:
        """The model's configuration, as transformers reads it."""
        return self.root / CONFIG_FILE

    @property
    def chat_template(self) -> Path:
        """The chat template, where the model has one."""
        return self.root / "chat_template.jinja"

    @property
    def plan(self) -> Path:
        """See `planning.plan.Plan`."""
        return self.root / PLAN_FILE

    @property
    def profile(self) -> Path:
        """The device profile's own text."""
        return self.root / "profile.toml"

    @property
    def reference(self) -> ReferenceFile:
        """What a reference in torch needs besides the matrices, and the held-out text."""
        return ReferenceFile(path=self.root / REFERENCE_FILE)

    @property
    def golden(self) -> Path:
        """See `golden`; only where a reference in torch was at hand."""
        return self.root / GOLDEN_FILE

    @property
    def check(self) -> Path:
        """The acceptance test, to be run on the device."""
        return self.root / CHECK_FILE

    @property
    def card(self) -> Path:
        """What a person reads first."""
        return self.root / "README.md"

    @property
    def sums(self) -> Path:
        """Hashes of all files, as sha256sum reads them."""
        return self.root / SUMS_FILE

    @property
    def report(self) -> Path:
        """See `validation.report`."""
        return self.root / REPORT_FILE

    @property
    def report_page(self) -> Path:
        """The report for a browser."""
        return self.root / REPORT_PAGE

    def exists(self) -> bool:
        """Whether a bundle lies here."""
        return self.manifest.is_file()
