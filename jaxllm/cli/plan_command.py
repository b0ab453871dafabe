"""`jaxllm plan`: what a config needs and costs on a topology, without owning it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from jaxllm.data.records import check_target
from jaxllm.errors import InputError
from jaxllm.parallel.mesh import resolve_shape
from jaxllm.planning.launch import Launch, render
from jaxllm.planning.plan import Knobs, Request, search, smallest_that_holds, too_large, what_fits
from jaxllm.planning.topologies import GIB, Topology, find_topology
from jaxllm.training.run_folder import load_config, override

WORKER = "jaxllm.cli.plan_worker"


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles a config's program for a topology and returns memory, time, collectives.

    Raises:
      InputError: Bad input, a missing compiler, or a program that does not fit.
    """
    topology = find_topology(options.topology)
    if options.picture:
        check_target(Path(options.picture))
    config = override(load_config(Path(options.config)), options.overrides)
    if options.render:
        launch = launch_of(options.config, options.overrides, options.topology)
        return {"rendered": render(launch, Path(options.render)), "command": launch.command}
    decode = None
    if options.decode is not None:
        decode = {"context": options.decode, "rows": options.rows, "kv": options.kv}
    request = Request(WORKER, options.config, tuple(options.overrides), decode)
    knobs = knobs_of(config, decode)
    if knobs is not None:
        resolve_shape(knobs.mesh, topology.chips)  # Refuses before anything is compiled.
    figures = request.ask(topology)
    result = summary(options.config, topology, figures)
    if options.search and knobs is not None:
        result["knobs"] = search(request, topology, knobs, figures)
    elif not figures["memory"]["fits"]:
        raise InputError(_advice(request, topology, knobs, figures))
    if options.picture:
        from jaxllm.planning.picture import draw

        draw(figures, topology, Path(options.picture))
        result["picture"] = options.picture
    return result


SCRIPTS = {
    "TokenizerRun": "tokenizer.py",
    "CodeModelRun": "code_model.py",
    "RQTransformerRun": "code_model.py",
    "ClassifierRun": "classifier.py",
    "LanguageModelRun": "lm.py",
    "PreferenceRun": "preference.py",
}


def launch_of(config: str, overrides: list[str], topology: str, *, spot: bool = True) -> Launch:
    """Returns how a config is started on a topology.

    Raises:
      InputError: An unknown topology, a bad config, or one that no script runs on many hosts.
    """
    chosen = find_topology(topology)
    kind = type(override(load_config(Path(config)), overrides)).__name__
    if kind not in SCRIPTS:
        raise InputError(f"config {config}: a {kind} does not run on many hosts")
    return Launch(SCRIPTS[kind], config, tuple(overrides), chosen, spot)


def knobs_of(config: Any, decode: dict[str, Any] | None) -> Knobs | None:
    """Returns what can be turned in a config, None when it has no mesh."""
    if not hasattr(config, "mesh"):
        return None
    if decode is not None:
        return Knobs(decode["rows"], config.mesh, None, None)
    accumulate = getattr(config.optimizer, "accumulate", None)
    if type(config).__name__ == "TokenizerRun":  # It refuses micro-batches.
        accumulate = None
    remat = getattr(config.model, "remat", None)
    remat = remat if isinstance(remat, str) else None
    # A packed step has rows besides its examples, and both are cut into equal parts.
    batch = math.gcd(config.data.batch_size, getattr(config.data, "rows", None) or 0)
    return Knobs(batch, config.mesh, accumulate, remat)


def _advice(
    request: Request, topology: Topology, knobs: Knobs | None, figures: dict[str, Any]
) -> str:
    line = too_large(figures, topology)
    if (larger := smallest_that_holds(figures, topology)) is not None:
        return f"{line}; no knob helps, the smallest slice that holds the state is {larger}"
    found = None if knobs is None else what_fits(request, topology, knobs, figures)
    if found is None:
        return f"{line}; nothing that was tried fits, take a larger topology or a smaller batch"
    changes, better = found
    return f"{line}; fits with {' '.join(changes)} ({better['memory']['peak'] / GIB:.2f} GiB)"


def summary(config: str, topology: Topology, figures: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures in the order and the units in which people read them."""
    held = figures["memory"]
    result: dict[str, Any] = {
        "config": config,
        "program": figures["program"],
        "topology": topology.name,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "mesh": figures["mesh"],
        "fits": held["fits"],
        "peak GiB per chip": round(held["peak"] / GIB, 3),
    }
    if topology.chip is not None:
        result["HBM GiB per chip"] = round(topology.chip.hbm_bytes / GIB, 3)
        result["source of rates"] = topology.chip.source
    rows = [{"part": name, "GiB per chip": size / GIB} for name, size in figures["parts"].items()]
    if held["fits"]:
        for name in ("temporaries", "outputs", "code"):
            rows.append({"part": name, "GiB per chip": held[name] / GIB})
        read = "unread" not in figures
        result |= _times(topology, figures) if read else {"only memory": figures["unread"]}
    result["memory"] = rows
    if held["fits"] and read:
        result["collectives"] = [
            {
                "kind": one["kind"],
                "axes": one["axes"],
                "times": round(one["times"]),
                "largest MiB": one["nbytes"] / 1024**2,
                "ms in all": 1e3 * one["seconds"],
                "largest is": one["name"].removeprefix("jit(step)/")[-60:],
            }
            for one in figures["collectives"]
        ]
    return result


def _times(topology: Topology, figures: dict[str, Any]) -> dict[str, Any]:
    bounds, flops = figures["roofline"], figures["flops"]
    result: dict[str, Any] = {
        "attention": ", ".join(figures["attention_kernels"]) or "plain XLA",
        "compile seconds": round(figures["seconds"]["compile"], 1),
        "TFLOP per chip": {
            "by formula": None
            if figures["model_flops"] is None
            else figures["model_flops"] / topology.chips / 1e12,
            "compiled products": flops["products"] / 1e12,
            "kernels": flops["kernels"] / 1e12,
            "compiler's own count": (flops["compiler_says"] or 0) / 1e12,
        },
        "GB moved per chip": figures["memory_bytes"] / 1e9,
    }
    result["checks"] = figures["checks"]
    array, gather = figures["largest_array"], figures["largest_gather"]
    result["largest array"] = array["type"]
    result["largest array MiB"] = round(array["nbytes"] / 1024**2, 1)
    if gather is not None:
        result["largest all-gather MiB"] = round(gather["nbytes"] / 1024**2, 1)
        result["largest layer MiB"] = round(figures["layer_bytes"] / 1024**2, 1)
    if bounds is None:
        return result
    result["step seconds"] = {name: bounds[name] for name in ("best", "worst")}
    result["at peak rates"] = {name: bounds[name] for name in ("compute", "memory", "links")}
    result["bound by"] = bounds["bound"]
    if bounds["mfu"] is not None:
        result["MFU at best"] = round(bounds["mfu"], 4)
    if figures["tokens"] is not None:
        result["tokens per second at best"] = figures["tokens"] / bounds["best"]
    return result
