"""``patchbay train link-designs`` and ``patchbay eval link-designs``: ways to join a language model to media.

The base of a run is joined to its frozen decoders and to its frozen encoder in several ways, each with as
many steps on the same data and with several seeds. What makes media is trained as in stage 2, what reads
them as in stage 1; stage 3, which trains both together, is left out.
"""

from alignment.link_designs.designs import MAKERS, READERS, Maker, Reader
from alignment.link_designs.measuring import main_designs, table
from alignment.link_designs.training import train

__all__ = ["MAKERS", "READERS", "Maker", "Reader", "main_designs", "table", "train"]
