"""The page of peers and its CSV."""

import os
import statistics
from collections.abc import Sequence

import pandas as pd
import torch

from qvlm.markdown import bullets, table
from qvlm.packing.kernels import native_build
from qvlm.records.environment import revision_in_words, surroundings
from qvlm.tables.cost import median_and_range
from qvlm.tables.peers.base import Peer
from qvlm.tables.peers.measure import (
    DECODING,
    LAYER,
    MODEL,
    PREFILL,
    TOKENS,
    Measured,
    Setting,
    Times,
)
from qvlm.tables.peers.ranking import faster, verdict

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # which importing qvlm sets
FULL_LAYERS = 40  # decoder layers of LLaVA-13B
MIB = 2**20
TITLES = {
    (LAYER, PREFILL): "Prefill, products of a decoder layer",
    (LAYER, DECODING): "Decoding, products of a decoder layer",
    (MODEL, PREFILL): "Prefill, whole decoder layers",
    (MODEL, DECODING): "Decoding, whole decoder layers",
}


def page(measured: Measured, peers: Sequence[Peer], setting: Setting, command: str) -> str:
    """Returns the Markdown page.

    Args:
        measured: What was measured.
        peers: All peers, those with an obstacle included.
        setting: How they were measured.
        command: Command that regenerates the page.
    """
    parts = [
        "# Packed layers beside other libraries",
        bullets(_notes(peers, setting, command)),
        "## Who is first",
        bullets(_verdicts(measured, peers)),
    ]
    for (part, phase), title in TITLES.items():
        parts += [f"## {title}", _table(measured, peers, part, phase)]
    return "\n\n".join(parts) + "\n"


def rows(measured: Measured, peers: Sequence[Peer]) -> pd.DataFrame:
    """Returns the CSV: a row for each part, phase and peer."""
    found = []
    for (part, phase), times in measured.times.items():
        for peer in peers:
            if peer.name not in times:
                continue
            own = times[peer.name]
            columns: dict[str, object] = {"part": part, "phase": phase, "peer": peer.name}
            columns |= {"bits": peer.bits, "weight_mib": measured.weight_bytes[peer.name] / MIB}
            columns |= _spread("seconds", own)
            for name, other in zip(("bf16", "w4a4"), _references(peers), strict=True):
                columns |= _spread(f"times_{name}", faster(times[other], own))
            found.append(columns)
    return pd.DataFrame(found)


def _spread(name: str, values: Sequence[float]) -> dict[str, object]:
    """Returns the columns of a median with its lowest and highest."""
    return {
        name: statistics.median(values),
        f"{name}_low": min(values),
        f"{name}_high": max(values),
    }


def _references(peers: Sequence[Peer]) -> tuple[str, str]:
    """Returns the names that ratios are to: the first two peers, which are bf16 and our W4A4."""
    return peers[0].name, peers[1].name


def _notes(peers: Sequence[Peer], setting: Setting, command: str) -> list[str]:
    """Returns how the page was made, and what its columns mean."""
    about = surroundings()
    hardware, config = about["hardware"], setting.config
    versions = {"torch": torch.__version__, "transformers": about["versions"]["transformers"]}
    present = [peer for peer in peers if peer.obstacle() is None]
    for peer in present:
        versions |= peer.versions()
    said = [peer.obstacle() or peer.note() for peer in peers]
    shapes = (
        f"hidden {config.hidden_size}, MLP {config.intermediate_size}, "
        f"{config.num_attention_heads} heads"
    )
    return [
        f"Command: `{command}`",
        f"Revision: {revision_in_words(about['git'])}",
        f"CPU: {hardware['cpu']}, {torch.get_num_threads()} threads. PyTorch uses "
        f"{torch.backends.cpu.get_cpu_capability()}, our C products {instruction_set()}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        f"Shapes of LLaVA-13B: {shapes}. Weights are random, and the same for all.",
        f"Prefill has {setting.prompt} rows. Decoding has one, after a prefill, and its time is "
        f"the median of {TOKENS} calls.",
        f"Peers took turns in each of {setting.repeats} repeats of one run, which load them anew: "
        "where weights lie in memory changes a time as well. Ratios are those of each repeat: "
        "median (lowest to highest). Above 1 is faster than what the column names.",
        f"Products are the seven of one decoder layer. Whole decoder layers are a model of "
        f"{setting.layers}, with attention and norms, and a column extrapolates to the "
        f"{FULL_LAYERS} of LLaVA-13B. llama.cpp has no single products, and ONNX Runtime no whole "
        "model here.",
        "Weights are the bytes of a decoder layer's linears as they are stored, scales included.",
        f"PyTorch {'asks' if os.environ.get(HUGE_PAGES) == '1' else 'does not ask'} for huge pages "
        f"of memory ({HUGE_PAGES}). llama.cpp and ONNX Runtime have memory of their own.",
        *dict.fromkeys(sentence for sentence in said if sentence),
    ]


def instruction_set() -> str:
    """Returns the instruction set of our compiled products on this machine."""
    try:
        names = [name for name in native_build.supported() if name not in native_build.left_out()]
    except OSError:  # no compiler
        names = []
    return names[0] if names else "none"


def _verdicts(measured: Measured, peers: Sequence[Peer]) -> list[str]:
    """Returns who is first, for each part and phase and number of bits."""
    found = []
    for (part, phase), title in TITLES.items():
        for ours in (peer for peer in peers if peer.is_ours):
            alike = [peer.name for peer in peers if peer.bits == ours.bits]
            times = _of(measured.times[part, phase], alike)
            if len(times) > 1:
                found.append(f"{title}, {ours.bits} bits: {verdict(times, ours.name)}")
    return found


def _of(times: Times, names: Sequence[str]) -> Times:
    return {name: times[name] for name in names if name in times}


def _table(measured: Measured, peers: Sequence[Peer], part: str, phase: str) -> str:
    """Returns the table of one part and phase."""
    times = measured.times[part, phase]
    full, ours = (times[name] for name in _references(peers))
    lines = []
    for peer in peers:
        if peer.name not in times:
            continue
        own = times[peer.name]
        milliseconds = 1e3 * statistics.median(own)
        line = [peer.name, f"{measured.weight_bytes[peer.name] / MIB:.1f}", f"{milliseconds:.2f}"]
        line += [median_and_range(faster(other, own)) for other in (full, ours)]
        if part == MODEL:
            line.append(f"{FULL_LAYERS * milliseconds / 1e3:.2f}")
        lines.append(line)
    header = ["", "weights, MiB", "ms per layer", "times bf16", f"times {_references(peers)[1]}"]
    header += [f"{FULL_LAYERS} layers, s, extrapolated"] if part == MODEL else []
    return table(header, lines)
