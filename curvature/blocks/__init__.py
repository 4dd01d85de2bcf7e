"""Curvature blocks: how a block is stored, applied and inverted."""

from curvature.blocks.block import Block
from curvature.blocks.dense import Dense
from curvature.blocks.diagonal import Diagonal
from curvature.blocks.eigen_kronecker import EigenKronecker
from curvature.blocks.identity import Identity
from curvature.blocks.kinds import BLOCKS, BlockKind, blocks_for
from curvature.blocks.kronecker import Kronecker

__all__ = [
    "BLOCKS",
    "Block",
    "BlockKind",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "Identity",
    "Kronecker",
    "blocks_for",
]
