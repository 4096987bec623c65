"""Chips and the links between them, as frozen values with units in their names.

They are read from ``hardware_profiles`` or from a user's own YAML file and checked on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Literal, TypeAlias, TypeVar, get_args

from sim.kernels import (
    AllReduce,
    Attention,
    Elementwise,
    Gemm,
    KernelConstants,
    Overhead,
    Sampler,
)
from sim.profiles import ProfileError, Section, build, names, read, stem

__all__ = ["Chip", "Link", "ProfileError", "Topology", "chips", "links", "load_chip", "load_link"]

Topology: TypeAlias = Literal["switch", "mesh", "ring", "pcie", "point_to_point", "storage"]
T = TypeVar("T")
UNCALIBRATED = "uncalibrated: generic constants of its class"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way for bytes to leave a device. Rates are for one direction, per device."""

    name: str
    topology: Topology
    bytes_per_s: float
    """At full fan-out; of reading, for storage."""
    write_bytes_per_s: float
    """Equal to ``bytes_per_s`` except for storage."""
    peers: int = 0
    """Devices joined to this one: all neighbours of a mesh, the others of a bridge group."""
    peer_bytes_per_s: float = 0.0
    """Mesh only: what one pair of devices has."""
    latency_s: float

    def __post_init__(self) -> None:
        for field in ("bytes_per_s", "write_bytes_per_s"):
            if not 0 < getattr(self, field) < inf:
                raise ValueError(f"{field}: must be positive, got {getattr(self, field)!r}")
        if self.latency_s < 0:
            raise ValueError(f"latency_s: must not be negative, got {self.latency_s!r}")
        if self.topology not in get_args(Topology):
            raise ValueError(f"topology: {self.topology!r} is none of {get_args(Topology)}")
        if self.topology in {"mesh", "point_to_point"} and self.peers < 1:
            raise ValueError(f"peers: a {self.topology} link needs at least 1, got {self.peers}")
        if self.topology == "mesh" and not (
            0 < self.peer_bytes_per_s <= self.bytes_per_s <= self.peers * self.peer_bytes_per_s
        ):
            raise ValueError(
                f"peer_bytes_per_s: {self.peers} peers at {self.peer_bytes_per_s:g} "
                f"do not give {self.bytes_per_s:g} at full fan-out"
            )

    def rate(self, ranks: int) -> float:
        """Bytes per second that each of ``ranks`` devices can send to the others together.

        A switch gives its full rate to any group. In a mesh a device only uses the links to the
        members of its group, so a pair gets one of them.
        """
        if self.topology == "mesh":
            return min(self.bytes_per_s, (ranks - 1) * self.peer_bytes_per_s)
        return self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One device as the serving engine sees it: one die of a two-die package. Peaks are dense."""

    name: str
    title: str
    vendor: str
    trust: Literal["A", "B", "C", "D"]
    """A: specification and measurements agree. B: measurements thin. C: press. D: do not use."""
    memory_bytes: int
    """What the engine can see, before its own utilisation limit."""
    memory_bytes_per_s: float
    bf16_flops: float
    int8_ops: float | None = None
    fp8_flops: float | None = None
    fp4_flops: float | None = None
    parallel_units: int
    """Multiprocessors; 100 stands in where nobody published the number."""
    devices_per_node: int
    dies_per_package: int = 1
    link: Link
    """Between the devices of a node."""
    die_link: Link | None = None
    """Between the dies of a package."""
    host_link: Link
    network_link: Link | None = None
    """Between nodes, per device."""
    tdp_w: float | None = None
    price_usd_per_h: float | None = None
    """Rent of one device; None where no comparable price was found."""
    kernels: KernelConstants
    calibrated: bool = False
    """The kernel constants were fitted to kernel measurements of this chip."""
    calibration: str = UNCALIBRATED
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("memory_bytes", "memory_bytes_per_s", "bf16_flops", "parallel_units"):
            if not 0 < getattr(self, field) < inf:
                raise ValueError(f"{field}: must be positive, got {getattr(self, field)!r}")
        for field in ("int8_ops", "fp8_flops", "fp4_flops", "tdp_w", "price_usd_per_h"):
            value = getattr(self, field)
            if value is not None and not 0 < value < inf:
                raise ValueError(f"{field}: must be positive or null, got {value!r}")
        if self.dies_per_package < 1 or self.devices_per_node % self.dies_per_package:
            raise ValueError(
                f"devices_per_node: {self.devices_per_node} devices cannot be packages of "
                f"{self.dies_per_package}"
            )
        if self.devices_per_node < 1:
            raise ValueError(f"devices_per_node: must be positive, got {self.devices_per_node}")

    def link_between(self, ranks: int) -> Link:
        """The slowest link that a group of neighbouring devices uses.

        Raises:
            ProfileError: the group spans nodes and the chip has no network.
        """
        if ranks > self.devices_per_node:
            if self.network_link is None:
                raise ProfileError(
                    f"chip '{self.name}': {ranks} ranks span nodes of {self.devices_per_node}, "
                    "and the chip has no network_link"
                )
            return self.network_link
        if self.die_link is not None and ranks <= self.dies_per_package:
            return self.die_link
        if self.link.topology == "point_to_point" and ranks > self.link.peers + 1:
            return self.host_link
        return self.link

    def link_bytes_per_s(self, ranks: int) -> float:
        """One-direction rate per device inside a group of ``ranks``; ``inf`` for one device."""
        return inf if ranks < 2 else self.link_between(ranks).rate(ranks)

    def collective(self, ranks: int) -> tuple[float, float]:
        """(t0 in seconds, bus bytes per second) of collectives among ``ranks`` >= 2 devices."""
        constants = self.kernels.all_reduce
        if ranks <= self.devices_per_node and (measured := constants.at(ranks)) is not None:
            return measured
        link = self.link_between(ranks)
        return constants.t0_s + link.latency_s, constants.link_efficiency * link.rate(ranks)


def chips() -> tuple[str, ...]:
    """Names that ``load_chip`` knows."""
    return names("chip")


def links() -> tuple[str, ...]:
    """Names that ``load_link`` knows."""
    return names("link")


@cache
def load_link(name: str) -> Link:
    """A link by name or by the path of a YAML file.

    Raises:
        ProfileError: unknown name, or a file with a missing, unknown or impossible value.
    """
    section = read("link", name)
    rate = section.number("bytes_per_s")
    section.text("title", "")
    section.provenance()
    values = {
        "name": stem(name),
        "topology": section.choice("topology", get_args(Topology)),
        "bytes_per_s": rate,
        "write_bytes_per_s": section.number("write_bytes_per_s", rate),
        "peers": section.integer("peers", 0),
        "peer_bytes_per_s": section.number("peer_bytes_per_s", 0.0),
        "latency_s": section.number("latency_s"),
    }
    section.close()
    return build(Link, section, values)


@cache
def load_chip(name: str) -> Chip:
    """A chip by name or by the path of a YAML file.

    Raises:
        ProfileError: unknown name, or a file with a missing, unknown or impossible value.
    """
    section = read("chip", name)
    trust = section.choice("trust", "ABCD")
    warnings = [section.text("warning")] if "warning" in section else []
    if trust == "D" and not warnings:
        raise section.error("warning", "missing; a chip of trust D must say why")
    calibrated = section.flag("calibrated", False)
    section.text("note", "")
    section.text("source", "")
    values = {
        "name": stem(name),
        "title": section.text("title"),
        "vendor": section.text("vendor"),
        "trust": trust,
        "memory_bytes": section.integer("memory_bytes"),
        "memory_bytes_per_s": section.number("memory_bytes_per_s"),
        "bf16_flops": section.number("bf16_flops"),
        "int8_ops": section.optional_number("int8_ops"),
        "fp8_flops": section.optional_number("fp8_flops"),
        "fp4_flops": section.optional_number("fp4_flops"),
        "parallel_units": section.integer("parallel_units"),
        "devices_per_node": section.integer("devices_per_node"),
        "dies_per_package": section.integer("dies_per_package", 1),
        "link": load_link(section.text("link")),
        "die_link": load_link(section.text("die_link")) if "die_link" in section else None,
        "host_link": load_link(section.text("host_link")),
        "network_link": (
            load_link(section.text("network_link")) if "network_link" in section else None
        ),
        "tdp_w": section.optional_number("tdp_w"),
        "price_usd_per_h": section.optional_number("price_usd_per_h"),
        "kernels": _kernels(section.section("kernels")),
        "calibrated": calibrated,
        "calibration": section.text("calibration", None if calibrated else UNCALIBRATED),
        "warnings": tuple(warnings),
    }
    section.close()
    return build(Chip, section, values)


def _kernels(section: Section) -> KernelConstants:
    fp8 = section.section("gemm_fp8") if "gemm_fp8" in section else None
    sampler = section.section("sampler")
    overhead = section.section("overhead")
    values = {
        "gemm": _gemm(section.section("gemm")),
        "gemm_fp8": None if fp8 is None else _gemm(fp8),
        "elementwise": _elementwise(section.section("elementwise")),
        "attention": _attention(section.section("attention")),
        "sampler": _numbers(Sampler, sampler, "t0_s", "sequence_s", "exponent"),
        "all_reduce": _all_reduce(section.section("all_reduce")),
        "overhead": _numbers(Overhead, overhead, "gap_factor", "step_s"),
    }
    section.close()
    return build(KernelConstants, section, values)


def _gemm(section: Section) -> Gemm:
    return _numbers(
        Gemm,
        section,
        "compute_efficiency",
        "memory_efficiency",
        "t0_s",
        knee=inf,
        parallel_loss=0.0,
        tile=0.0,
        m_half_tokens=0.0,
    )


def _elementwise(section: Section) -> Elementwise:
    return _numbers(
        Elementwise, section, "t0_s", "efficiency", cache_bytes=0.0, cache_efficiency=1.0
    )


def _attention(section: Section) -> Attention:
    optional: dict[str, object] = {
        "block_s": section.optional_number("block_s"),
        "prefill_efficiency": section.optional_number("prefill_efficiency"),
        "prefill_extra_tokens": section.integer("prefill_extra_tokens"),
    }
    return _numbers(
        Attention,
        section,
        "prefill_t0_s",
        "tail",
        "decode_efficiency",
        "decode_t0_s",
        given=optional,
        decode_sequence_s=0.0,
        decode_exponent=1.0,
        decode_min_tokens=0.0,
    )


def _all_reduce(section: Section) -> AllReduce:
    measured: list[tuple[int, float, float]] = []
    if "measured" in section:
        table = section.section("measured")
        for key in sorted(table.keys(), key=lambda key: key.zfill(6)):
            if not key.isdecimal():
                raise table.error(key, "expected a number of ranks")
            row = table.section(key)
            measured.append((int(key), row.number("t0_s"), row.number("bus_bytes_per_s")))
            row.close()
    return _numbers(
        AllReduce, section, "t0_s", "link_efficiency", given={"measured": tuple(measured)}
    )


def _numbers(
    kind: type[T],
    section: Section,
    *required: str,
    given: Mapping[str, object] | None = None,
    **defaults: float,
) -> T:
    """Builds a block of constants that share one tag and source."""
    values: dict[str, object] = dict(given or {})
    values.update({key: section.number(key) for key in required})
    values.update({key: section.number(key, value) for key, value in defaults.items()})
    section.provenance()
    section.close()
    return build(kind, section, values)
