"""What a ring step moves between GPUs, beside what their links carry.

    python -m torch.distributed.run --standalone --nproc-per-node 8 -m bench.cases.links --tokens 131072,1048576
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.cases.links --toy     # on the CPU

Every process passes latent rows to the next one, as ring attention does in each layer, and all do so at once. A
message of 256 MiB shows the links' bandwidth; keys and values of all heads, which rings of ordinary attention
pass, are beside it in bytes. The forward pass of a layer takes one step less than there are processes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ic_model.presets import preset, preset_names
from ic_train.context_parallel import Ring
from ic_train.results import new_result_folder, write_result
from torch import distributed as dist

TOPIC = "links"
LARGE_BYTES, TOY_BYTES = 256 * 2**20, 2**20
DTYPE = torch.bfloat16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the first process prints and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.cases.links", description=__doc__)
    add = parser.add_argument
    add("--tokens", default="131072,1048576", help="of a whole sequence, with commas between")
    add("--model", default="ic-1b", choices=preset_names(), help="whose rows are passed (default: ic-1b)")
    add("--repeats", type=int, default=20, help="steps that are timed, of each size (default: 20)")
    add("--results", type=Path, default=Path("bench/results"), metavar="DIR")
    add("--toy", action="store_true", help="small messages on the CPU, no result")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not options.toy
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        device = torch.device("cpu")
        if on_gpu:
            device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
            torch.cuda.set_device(device)
        rows = measure(options, device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    if rows and not options.toy:
        folder = new_result_folder(options.results, TOPIC)
        write_result(folder, TOPIC, rows)
        print(f"written: {folder}")
    return 0


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row per message; on the first process only.

    Raises:
        ValueError: the processes cannot share a sequence of that length.
    """
    ring = Ring(dist.group.WORLD)
    config = preset(options.model)
    row_bytes = config.latent_dim * DTYPE.itemsize
    expanded_bytes = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * DTYPE.itemsize
    messages = [("link", 0, (TOY_BYTES if options.toy else LARGE_BYTES))]
    for word in options.tokens.split(","):
        tokens = int(word) if word.isdigit() else 0
        if tokens < ring.size or tokens % ring.size:
            raise ValueError(f"--tokens has {word!r}; accepted: multiples of the {ring.size} processes")
        messages.append(("rows", tokens, tokens // ring.size * row_bytes))
    rows = []
    for kind, tokens, size in messages:
        samples = _steps(
            ring, torch.zeros(size // DTYPE.itemsize, dtype=DTYPE, device=device), options.repeats
        )
        seconds = statistics.median(samples)
        row = {
            "message": kind,
            "model": options.model,
            "gpus": ring.size,
            "tokens_per_sequence": tokens,
            "bytes_per_step": size,
            "expanded_bytes_per_step": tokens // ring.size * expanded_bytes,
            "median_us": round(seconds * 1e6, 1),
            "gb_per_s": round(size / seconds / 1e9, 2),
            "samples_us": [round(sample * 1e6, 1) for sample in samples],
        }
        if dist.get_rank() == 0:
            rows.append(row)
            print(
                f"{kind:5} {tokens:>9,} tokens {size / 2**20:>8.1f} MiB a step {row['median_us']:>10,.1f} us "
                f"{row['gb_per_s']:>7.1f} GB/s each way",
                flush=True,
            )
    return rows


def _steps(ring: Ring, tensor: torch.Tensor, repeats: int) -> list[float]:
    """Seconds of each step, of the slowest process."""
    samples = []
    # the first ones make the connections
    for number in range(3 + repeats):
        dist.barrier()
        _wait(tensor.device)
        started = time.perf_counter()
        ring.finish(ring.start_passing(tensor))
        _wait(tensor.device)
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=tensor.device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        if number >= 3:
            samples.append(float(taken))
    return samples


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
