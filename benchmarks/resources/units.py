"""Which unit executes an instruction, and how many an H100 executes per clock."""

from __future__ import annotations

from typing import Final, NamedTuple

#: column -> opcodes; what is in none of them is "other"
COLUMNS: Final[dict[str, frozenset[str]]] = {
    name: frozenset(opcodes.split())
    for name, opcodes in {
        "MUFU": "MUFU",
        "FP32": "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSET FSETP FCHK FADD2 FMUL2 FFMA2",
        "FP64": "DADD DMUL DFMA DSETP DMNMX",
        "INT": "IADD IADD3 IADD32I IABS IMAD IMNMX VIMNMX VIMNMX3 VIADDMNMX VIADD ISETP LOP LOP3 "
        "PLOP3 LEA SHF SHL SHR SEL MOV MOV32I PRMT SGXT BMSK FLO POPC BREV P2R R2P HFMA2 HADD2 "
        "CS2R I2FP I2IP F2FP R2UR S2UR S2R UIADD3 UIMAD UISETP ULOP3 UPLOP3 ULEA USHF USEL UMOV "
        "UFLO UPOPC UP2UR UR2UP UPRMT USGXT UVIADD UIADD3X UVIMNMX UBMSK UIABS IADD64 UIADD364",
        "CONV": "F2F I2F F2I FRND",
        "LDG": "LDG LD LDGSTS",
        "STG": "STG ST",
        "LDS/STS": "LDS STS LDSM STSM",
        "SHFL": "SHFL",
        "LDC": "LDC ULDC LDCU",
        "BAR": "BAR WARPSYNC DEPBAR LDGDEPBAR MEMBAR ERRBAR CCTL SYNCS",
        "LDL/STL": "LDL STL",
        "MMA": "HMMA HGMMA IMMA UTCHMMA UTCQMMA DMMA QGMMA",
    }.items()
}


class Unit(NamedTuple):
    """What instructions wait for: lanes that it serves per clock and multiprocessor."""

    lanes: float
    kinds: frozenset[str] | None
    """None: every instruction"""


_FMA: Final = frozenset(["FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "IMAD"])
_LSU_COLUMNS: Final = ("LDG", "STG", "LDS/STS", "SHFL", "LDL/STL")
_SLOW: Final = frozenset(["POPC", "FLO", "BREV"])
#: on neither pipe of 64 or 128 lanes: the uniform datapath, special registers, packed arithmetic
_ELSEWHERE: Final = frozenset(
    {x for x in COLUMNS["INT"] if x.startswith("U")}
    | {"S2R", "S2UR", "R2UR", "CS2R", "FADD2", "FMUL2", "FFMA2"}
)

#: Compute capability 9.0: throughput table of the CUDA programming guide; four schedulers issue one
#: warp instruction per clock each. LSU: one request of 32 lanes per clock, conflicts not counted.
UNITS: Final[dict[str, Unit]] = {
    "issue": Unit(128, None),
    "FP32": Unit(128, _FMA),
    "ALU": Unit(64, (COLUMNS["FP32"] | COLUMNS["INT"]) - _FMA - _SLOW - _ELSEWHERE),
    "FP64": Unit(64, COLUMNS["FP64"]),
    "MUFU": Unit(16, COLUMNS["MUFU"] | COLUMNS["CONV"] | _SLOW),
    "LSU": Unit(32, frozenset().union(*(COLUMNS[x] for x in _LSU_COLUMNS))),
}
MULTIPROCESSORS: Final = 132
CLOCK: Final = 1.755e9
BANDWIDTH: Final = {"peak": 3.35e12, "copies": 3.0e12}


def column_of(kind: str) -> str:
    return next((name for name, kinds in COLUMNS.items() if kind in kinds), "other")
