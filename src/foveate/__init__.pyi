# Written by docs/generate.py from the registry. What the package does stands in __init__.py.

from .engine import Pruned, PruneReport, UnsupportedError, prune, restore
from .families import family_names as families
from .families import get_family
from .methods import get_method, method_class
from .methods import method_names as methods
from .methods.adaptinfer import AdaptInfer
from .methods.aircache import AirCache
from .methods.apet import ApET
from .methods.attention_predictor import AttentionPredictor
from .methods.base import Method
from .methods.baselines import Random, RandomCache, RandomCross, RandomLayer, Uniform
from .methods.cdpruner import CDPruner
from .methods.clip_baselines import RandomClip, UniformFrames
from .methods.csp import CSP
from .methods.dart import DART
from .methods.divprune import DivPrune
from .methods.dycoke import DyCoke
from .methods.elastic_cache import ElasticCache
from .methods.evs import EVS
from .methods.fastv import FastV
from .methods.fastvid import FastVID
from .methods.fopru import FoPru
from .methods.gsearch import GSearch
from .methods.holitom import HoliTom
from .methods.mint import MINT
from .methods.mixkv import MixKV
from .methods.mmtok import MMTok
from .methods.plphp import PLPHP
from .methods.pooling import Pooling
from .methods.prefixkv import PrefixKV
from .methods.psigmoid import PSigmoid
from .methods.pyramiddrop import PyramidDrop
from .methods.quecc import QueCC
from .methods.scope import SCOPE
from .methods.sgl import SGL
from .methods.sparsemm import SparseMM
from .methods.sparsevlm import SparseVLM
from .methods.step_baselines import LastStep, Pages, PerTurn, RunningSum
from .methods.topv import TopV
from .methods.trimmed_llama import TrimmedLlama
from .methods.v2drop import V2Drop
from .methods.vidcom2 import VidCom2
from .methods.videollm_mod import VideoLLMMoD
from .methods.visionzip import VisionZip
from .methods.vistog import VisToG
from .methods.visual_snapkv import VisualSnapKV
from .methods.vtc_cls import VTCCLS
from .methods.zipvl import ZipVL

__version__: str
__all__ = [
    "CSP",
    "DART",
    "EVS",
    "MINT",
    "PLPHP",
    "SCOPE",
    "SGL",
    "VTCCLS",
    "AdaptInfer",
    "AirCache",
    "ApET",
    "AttentionPredictor",
    "CDPruner",
    "DivPrune",
    "DyCoke",
    "ElasticCache",
    "FastV",
    "FastVID",
    "FoPru",
    "GSearch",
    "HoliTom",
    "LastStep",
    "MMTok",
    "Method",
    "MixKV",
    "PSigmoid",
    "Pages",
    "PerTurn",
    "Pooling",
    "PrefixKV",
    "PruneReport",
    "Pruned",
    "PyramidDrop",
    "QueCC",
    "Random",
    "RandomCache",
    "RandomClip",
    "RandomCross",
    "RandomLayer",
    "RunningSum",
    "SparseMM",
    "SparseVLM",
    "TopV",
    "TrimmedLlama",
    "Uniform",
    "UniformFrames",
    "UnsupportedError",
    "V2Drop",
    "VidCom2",
    "VideoLLMMoD",
    "VisToG",
    "VisionZip",
    "VisualSnapKV",
    "ZipVL",
    "families",
    "get_family",
    "get_method",
    "method_class",
    "methods",
    "prune",
    "restore",
]
