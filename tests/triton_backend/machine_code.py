"""What the tests read from the machine code of kernels that were compiled for a GPU that is not here."""

from __future__ import annotations

import re

from adasplash_triton import aot

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?(.*?);")


def products_fused_into_exchanges(cubin: bytes) -> int:
    """How many instructions add a product to a value that another thread just sent, rounding once.

    Each thread of a sum then rounds differently, and a loop that ends by the sum may end at different steps in threads of one row.
    """
    found, sent = 0, set()
    for match in _INSTRUCTION.finditer(aot.cuobjdump(cubin, "-sass")):
        instruction = match[2]
        if match[1] is None and instruction.startswith(("BRA ", "EXIT")):
            sent.clear()  # what follows is reached from elsewhere
            continue
        if exchange := re.match(r"SHFL\S* PT, (R\d+)", instruction):
            sent.add(exchange[1])
            continue
        operation, *operands = re.split(r"[ ,]+", instruction)
        if operation.startswith("FFMA") and len(operands) > 3 and operands[3] in sent:
            found += 1
        if operands:
            sent.discard(operands[0])
    return found
