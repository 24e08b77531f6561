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
    dst: Annotated[Path, typer.Argument(help="Output folder or file.")],
    to: Annotated[Target, typer.Option(help="Output format; see phi3-lora docs export.")],
    base: Annotated[str | None, typer.Option(help="Base model, if the adapter records none.")] = None,
    target_base: Annotated[str | None, typer.Option(help="Base model to record in the new adapter.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha for loralib and torchtune files.")] = None,
    r: Annotated[int | None, typer.Option(help="Expected r of a loralib file.")] = None,
    enable_lora: Annotated[
        list[str] | None, typer.Option(help="Groups, for example qkv_proj=T,F,T; repeatable.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="GGUF data type.")] = "auto",
    max_shard: Annotated[str, typer.Option(help="Maximum size of each model file.")] = "2GB",
    compact: Annotated[bool, typer.Option(help="Drop ranks that change nothing.")] = True,
    uniform: Annotated[bool, typer.Option("--uniform", help="One rank and alpha for all modules.")] = False,
    drop_equal_embeddings: Annotated[
        bool, typer.Option("--drop-equal-embeddings", help="Drop saved embeddings equal to the base's.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Compare the logits of converted models.")] = True,
    max_rank: Annotated[int, typer.Option(min=1, help="Maximum rank your server accepts.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing output.")] = False,
    rows: Annotated[bool, typer.Option("--rows", help="Report every row.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert an adapter or a model to another format.

    Reads loralib, PEFT, torchtune and MLX adapters; fuses and splits projections; writes GGUF.
    """
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
    out: Annotated[Path, typer.Argument(help="Output folder for the merged model.")],
    base: Annotated[str | None, typer.Option(help="Unquantised base, if it moved.")] = None,
    dtype: Annotated[DType, typer.Option(help="Dtype to save in; auto keeps the base's.")] = "auto",
    max_shard: Annotated[str, typer.Option(help="Maximum size of each file.")] = "2GB",
    check: Annotated[bool, typer.Option(help="Compare logits with PEFT's, if memory allows.")] = True,
    untie: Annotated[bool, typer.Option("--untie", help="Untie head and embeddings.")] = False,
    quantized: Annotated[
        Literal["auto", "none", "nf4", "int8"], typer.Option(help="Base quantisation used in training.")
    ] = "auto",
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Merge onto the dequantised base.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing output.")] = False,
) -> None:
    """Merge an adapter into its base model.

    Works shard by shard, and checks the result before it is moved into place.
    """
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
