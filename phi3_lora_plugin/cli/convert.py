"""`phi3-lora convert` and `phi3-lora merge`: other people's formats, and adapters folded into their base."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

Target = Literal["peft", "fused", "split", "loralib", "gguf", "llama-base", "phi3-base"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


def convert_command(
    src: Annotated[Path, typer.Argument(help="Adapter folder or file, checkpoint, run, or model folder.")],
    dst: Annotated[Path, typer.Argument(help="Folder or file to write.")],
    to: Annotated[Target, typer.Option(help="What to make of it; see docs/export.md.")],
    base: Annotated[
        str | None, typer.Option(help="Model folder or cached hub id, where the adapter names none.")
    ] = None,
    target_base: Annotated[str | None, typer.Option(help="Base that the new adapter shall name.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha of a loralib or torchtune file.")] = None,
    r: Annotated[int | None, typer.Option(help="r of a loralib file, to be checked.")] = None,
    enable_lora: Annotated[list[str] | None, typer.Option(help="As qkv_proj=T,F,T; repeatable.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of GGUF files.")] = "auto",
    max_shard: Annotated[str, typer.Option(help="Size of one file of a model.")] = "2GB",
    compact: Annotated[bool, typer.Option(help="Share and leave out ranks where that changes nothing.")] = True,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="One rank and alpha for all modules, the rest goes into B.")
    ] = False,
    drop_equal_embeddings: Annotated[
        bool, typer.Option("--drop-equal-embeddings", help="Leave out saved embeddings that equal the base's.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Compare the logits of converted models.")] = True,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank that your server takes.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    rows: Annotated[bool, typer.Option("--rows", help="Report every row.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON, nothing else.")] = False,
) -> None:
    """Convert an adapter or a model: loralib, PEFT, torchtune, fused and split projections, GGUF."""
    from phi3_lora_plugin.export.convert import convert
    from phi3_lora_plugin.lora_files.loralib_files import parse_enable_lora

    report = convert(
        src, dst, to, base=base, target_base=target_base, alpha=alpha, r=r,
        enable_lora=dict(parse_enable_lora(text) for text in enable_lora) if enable_lora else None,
        dtype=dtype, max_shard=max_shard, compact=compact, uniform=uniform,
        drop_equal_embeddings=drop_equal_embeddings, check=check, overwrite=overwrite, max_rank=max_rank,
    )  # fmt: skip
    print(json.dumps(report.as_dict()) if as_json else "\n".join(report.lines(every_row=rows)))


def merge_command(
    adapter: Annotated[Path, typer.Argument(help="Adapter, checkpoint or run folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the merged model into.")],
    base: Annotated[str | None, typer.Option(help="Unquantised base, where it is not as the adapter says.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the written weights; auto is the base's.")] = "auto",
    max_shard: Annotated[str, typer.Option(help="Size of one file, and about the memory needed.")] = "2GB",
    check: Annotated[bool, typer.Option(help="Compare the logits with PEFT's, if the model fits into memory.")] = True,
    untie: Annotated[bool, typer.Option("--untie", help="Write tied head and embeddings apart.")] = False,
    quantized: Annotated[
        Literal["auto", "none", "nf4", "int8"], typer.Option(help="How the base was quantised in training.")
    ] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge onto the values that the quantised base had.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Fold an adapter into its base, shard by shard, and check the result before it is done."""
    from phi3_lora_plugin.export.merge import VerificationError, merge

    try:
        report = merge(
            adapter, base, out, dtype, max_shard, overwrite=overwrite, check="auto" if check else "modules",
            untie=untie, quantized=quantized, dequantize=dequantize,
        )  # fmt: skip
    except VerificationError as error:
        print(f"failed: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print("\n".join(report.lines()))
