"""Both phases on one instance, the classic deployment."""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.api import ClusterView, InstanceView, PDPolicy, Placement, RequestView, Router
from policies.registry import register
from policies.routing.round_robin import RoundRobin


@register("pd/colocated")
@dataclass(slots=True, eq=False)
class Colocated(PDPolicy):
    """Compute the prompt and decode on the one instance that the router picks."""

    router: Router = field(default_factory=RoundRobin)
    """Picks the instance."""

    def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
        instance = self.router.route(request, cluster.instances, now)
        return Placement(instance, instance)

    def changed(self, instance: InstanceView) -> None:
        self.router.changed(instance)

    @property
    def listens(self) -> bool:
        mine = type(self).changed is not Colocated.changed
        return mine or type(self.router).changed is not Router.changed
