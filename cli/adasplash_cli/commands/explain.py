"""``adasplash explain``: which backend and config a call would get, and why, without making the call."""

from __future__ import annotations

from typing import get_args

import click

from adasplash_cli.options import DTYPES, find_device
from adasplash_cli.output import json_option, print_json
from adasplash_core.spec import Alignment, AlphaClass, AttentionSpec, MaskKind

SPECIAL_ALPHAS: dict[float, AlphaClass] = {1.0: "1", 1.5: "1.5", 2.0: "2"}


def _alpha_class(context: click.Context, parameter: click.Parameter, value: str) -> AlphaClass:
    """What a call's spec says of this alpha."""
    if value == "tensor":
        return "any"
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 1 <= number <= 2:
        message = f"{value!r} is neither a number from 1 (softmax) to 2 (sparsemax) nor 'tensor'"
        raise click.BadParameter(message, context, parameter)
    return SPECIAL_ALPHAS.get(number, "other")


@click.command("explain")
@click.option("--heads", type=click.IntRange(1), required=True, help="Query heads.")
@click.option("--kv-heads", type=click.IntRange(1), help="Key and value heads.  [as --heads]")
@click.option("--length", type=click.IntRange(0), required=True, help="Keys.")
@click.option("--q-length", type=click.IntRange(0), help="Queries.  [as --length]")
@click.option("--head-dim", type=click.IntRange(1), required=True, help="Of query and key.")
@click.option("--head-dim-v", type=click.IntRange(1), help="Of value.  [as --head-dim]")
@click.option("--batch", type=click.IntRange(0), default=1, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice((*DTYPES, "tf32")),
    default="float32",
    show_default=True,
    help="tf32: float32 where PyTorch lets products be rounded to TF32.",
)
@click.option("--causal", is_flag=True, help="is_causal=True.")
@click.option("--causal-alignment", type=click.Choice(get_args(Alignment)), default="top_left", show_default=True)
@click.option("--alpha", callback=_alpha_class, default="1.5", show_default=True, metavar="NUMBER|tensor", help="From 1 to 2.")
@click.option("--alpha-per-head", is_flag=True, help="alpha is a tensor of one number a head.")
@click.option("--alpha-grad", is_flag=True, help="alpha is a tensor that requires grad.")
@click.option("--device", help="As torch names it.  [cuda if there is one, else cpu]")
@click.option("--backward/--forward-only", default=True, show_default=True, help="Whether a backward may follow.")
@click.option("--window", is_flag=True, help="With a sliding window.")
@click.option("--query-offset", is_flag=True, help="With a query_offset.")
@click.option("--kv-lengths", is_flag=True, help="With kv_lengths (right padding).")
@click.option("--kv-starts", is_flag=True, help="With kv_starts (left padding).")
@click.option("--packed", is_flag=True, help="With cu_seqlens; --batch counts sequences, --length is the longest.")
@click.option("--alibi", is_flag=True, help="With alibi_slopes.")
@click.option("--mask", type=click.Choice(get_args(MaskKind)), default="none", show_default=True, help="Kind of attn_mask.")
@click.option("--mask-grad", is_flag=True, help="The additive attn_mask requires grad.")
@click.option("--dropout", is_flag=True, help="With dropout_p > 0.")
@click.option("--deterministic", is_flag=True, help="deterministic=True.")
@click.option("--stats", is_flag=True, help="return_stats=True.")
@click.option("--backend", default="auto", show_default=True, help="Ask for this backend by name, as in the call.")
@json_option
def command(
    heads: int,
    kv_heads: int | None,
    length: int,
    q_length: int | None,
    head_dim: int,
    head_dim_v: int | None,
    batch: int,
    dtype: str,
    causal: bool,
    causal_alignment: Alignment,
    alpha: AlphaClass,
    alpha_per_head: bool,
    alpha_grad: bool,
    device: str | None,
    backward: bool,
    window: bool,
    query_offset: bool,
    kv_lengths: bool,
    kv_starts: bool,
    packed: bool,
    alibi: bool,
    mask: MaskKind,
    mask_grad: bool,
    dropout: bool,
    deterministic: bool,
    stats: bool,
    backend: str,
    as_json: bool,
) -> None:
    """Say which backend and config a call would get, and why.

    The options describe one call of adasplash_core.attention. For every pass the answer names the config, the rung of the ladder it
    came from (user database, stale, shipped, heuristic) and the reason; and for every other backend, why it was not taken.
    """
    if heads % (kv_heads or heads):
        raise click.BadParameter(f"{kv_heads} key heads do not divide {heads} query heads", param_hint="--kv-heads")
    if mask != "none" and (causal or packed):
        raise click.UsageError(f"--mask excludes {'--causal' if causal else '--packed'}, as in the call.")
    if mask_grad and mask != "additive":
        raise click.UsageError("--mask-grad needs --mask additive.")

    from adasplash_core.dispatch import explain_spec
    from adasplash_core.precision import knows_tf32

    _, facts = find_device(device)
    if dtype == "tf32" and not knows_tf32(facts.type):
        raise click.BadParameter(f"TF32 is of NVIDIA's GPUs, not of {facts.name}", param_hint="--dtype")
    spec = AttentionSpec(
        device_type=facts.type,
        dtype="float32" if dtype == "tf32" else dtype,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v or head_dim,
        batch=batch,
        q_len=length if q_length is None else q_length,
        kv_len=length,
        causal=causal,
        causal_alignment=causal_alignment,
        query_offset=query_offset,
        window=window,
        kv_lengths=kv_lengths,
        kv_starts=kv_starts,
        packed=packed,
        alibi=alibi,
        mask=mask,
        mask_requires_grad=mask_grad and backward,
        alpha_class="any" if alpha_per_head or alpha_grad else alpha,
        alpha_per_head=alpha_per_head,
        alpha_requires_grad=alpha_grad and backward,
        dropout=dropout,
        needs_grad=backward,
        deterministic=deterministic,
        return_stats=stats,
        tf32=dtype == "tf32",
    )
    explanation = explain_spec(spec, facts, backend)
    if as_json:
        print_json(explanation.as_dict())
    else:
        click.echo(str(explanation))
