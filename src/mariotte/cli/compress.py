"""``mariotte compress``: one chain on one model, saved as a checkpoint that loads anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mariotte.cli._takes import expected
from mariotte.cli.console import print_json, print_table, progress, say, stopped_cleanly

__all__ = ["compress"]


def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, testbed/NAME or a hub id.")],
    chain: Annotated[str, typer.Argument(metavar="CHAIN", help='Such as "slice@0.3 | lora@1M".')],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must not exist yet, or be empty.")],
    calibration: Annotated[
        str | None,
        typer.Option(help="Corpus to look at: a name or file:PATH.  [default: the testbed's for its models]"),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Blocks of calibration text.")] = 128,
    block: Annotated[int | None, typer.Option(min=2, help="Tokens in a block.  [default: the corpus' own]")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Compute in this dtype.  [default: float32 on a CPU]")] = None,
    store: Annotated[
        str | None, typer.Option(help="Dtype of the stored weights.  [default: in which they were computed]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of every random choice.")] = 0,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read the model block by block from its files instead of loading it whole.  [default: when it would "
            "not fit into free memory]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the chain and say what it means and takes: memory, time.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Compress a model by one chain and save it as an ordinary checkpoint.

    The checkpoint is loaded back by stock transformers and its logits are compared before the folder appears; a model
    card says what was done. A model larger than memory is streamed: blocks are read, cut and written one after another,
    with scratch files beside the checkpoint, and the checkpoint is read back the same way.
    """
    import contextlib
    import tempfile

    from mariotte import chain as chains
    from mariotte.errors import ChainError
    from mariotte.experiments import foresight, identity
    from mariotte.experiments.estimate import preflight
    from mariotte.experiments.pipeline import compress_model
    from mariotte.models import checkpoint, dynamic
    from mariotte.models.load import find_device, find_dtype, load, locate, read_config
    from mariotte.models.packed import is_packed

    parts = identity.resolve(chains.parse(chain))
    canonical = " | ".join(str(part.link) for part in parts) or "dense"
    if calibration is None and model.startswith("testbed/"):
        calibration = "testbed/all"
    find_device(device)
    stored = None if store is None else find_dtype(store)
    target = checkpoint.check_target(out)
    foresight.check(model, read_config(locate(model)), parts, device=device)
    takes = preflight(
        model,
        parts,
        calibration=calibration,
        rows=rows,
        block=block,
        device=device,
        dtype=dtype,
        stream=stream,
    )
    if takes.streamed and takes.cannot_stream:
        raise ChainError(takes.cannot_stream)
    if dry_run:
        if as_json:
            plan = {"model": model, "n_params": takes.n_params, "chain": canonical, "calibration": calibration}
            print_json({**plan, "preflight": takes})
        else:
            say(f"{model}: {takes.n_params:,} parameters; chain: {canonical}; calibration: {calibration or 'none'}")
            say(expected(takes))
        return
    tight = takes.free_bytes is not None and takes.peak_bytes > takes.free_bytes
    if tight or (takes.streamed and stream is None):
        say(expected(takes))
    with stopped_cleanly(), contextlib.ExitStack() as stack, progress(f"compress {model}") as update:
        scratch = None
        if takes.streamed:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
            scratch = Path(stack.enter_context(temporary))
        dense = load(model, device, dtype, stream=scratch)
        done = compress_model(
            dense,
            chain,
            calibration=calibration,
            rows=rows,
            block=block,
            seed=seed,
            stream=scratch,
            progress=lambda stage, share: update(0, text=stage if not share else f"{stage} {share:.0%}"),
        )
        update(0, text="saving, loading back and comparing")
        folder = checkpoint.save(done, out, dtype=stored, dense_params=dense.counts.n_params)
        scopes = {step.scope for step in done.done[len(dense.done) :] if step.in_scope}
        zeros = done.zeros(*scopes) if scopes else 0
    counts, base = done.counts, dense.counts
    stored = stored or done.hf.dtype
    base_bytes, file_bytes = base.n_params * dense.stored_dtype.itemsize, checkpoint.file_bytes(folder)
    packed_bytes = counts.n_bytes if done.rounded else None
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "chain": canonical,
                "base_params": base.n_params,
                "n_params": counts.n_params,
                "ratio": 1 - counts.n_params / base.n_params,
                "zeroed": zeros / base.n_params,
                "base_file_bytes": base_bytes,
                "file_bytes": file_bytes,
                "packed_bytes": packed_bytes,
                "dtype": str(stored).removeprefix("torch."),
                "steps": done.done,
            }
        )
        return
    names = [str(dtype).removeprefix("torch.") for dtype in (dense.stored_dtype, stored)]
    rows_of = [
        [
            "parameters",
            f"{base.n_params:,}",
            f"{counts.n_params:,}",
            f"{1 - counts.n_params / base.n_params:.1%} removed",
        ],
        [
            "bytes of the file",
            f"{base_bytes:,}",
            f"{file_bytes:,}",
            f"{names[0]}, {names[1]}" if names[0] != names[1] else names[0],
        ],
        ["FLOPs a token", f"{base.flops_per_token:,.0f}", f"{counts.flops_per_token:,.0f}", ""],
    ]
    held = is_packed(read_config(folder)) and all("stored" in step.facts for step in done.rounded)
    if packed_bytes is not None and not held:
        rows_of.insert(2, ["bytes if packed", f"{base.n_bytes:,}", f"{packed_bytes:,}", "quantization is simulated"])
    print_table(f"{model} after {canonical}", ["", "dense", "compressed", ""], rows_of)
    for step in done.done:
        if found := step.facts.get("chain"):
            say(f"{step.step} found: {found}")
        if warned := step.facts.get("warning"):
            say(f"{step.step}: {warned}")
    if zeros:
        say(f"{zeros:,} weights are zero: the checkpoint is as large and as fast as before; zeros alone save nothing")
    if stored.itemsize > dense.stored_dtype.itemsize:
        say(f"stored as {names[1]}, in which it was computed; --store {names[0]} rounds the weights as the base's are")
    # Elsewhere than here transformers leaves inputs unrounded: the card says so.
    reader = "transformers with mariotte" if dynamic.modules(done.hf.config) else "stock transformers"
    if takes.streamed:
        say(f"saved, read back block by block into the modules of {reader}, logits equal: {folder}")
        return
    say(f"saved, loaded back by {reader}, logits equal: {folder}")
