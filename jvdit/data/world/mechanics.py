"""Motion of the procedural world, exact: from event to event, without a time step.

Between bounces every object flies on a parabola (a line without gravity), so the next
bounce of a scene is the smallest root of a few quadratics. Objects meet the walls with
the true extents of their shapes and one another as elastic discs of equal area, whose
mass is the square of their radius. All scenes of a batch advance together, one event
each per turn, and none depends on its neighbours.

Units and dimensions are those of `jvdit.data.world.scene`; in addition e bounces.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jvdit.data.world.scene import GRAVITY, MAX_OBJECTS, Scenes

WALL_X, WALL_Y, PAIR = 0, 1, 2  # kinds of bounces: side walls, floor or ceiling, discs

_FIRST, _SECOND = np.triu_indices(MAX_OBJECTS, 1)  # all pairs of objects


@dataclasses.dataclass(frozen=True)
class Motion:
    """Ground truth of how a batch of scenes moves; see the module for units.

    Column e of the bounces starts flight e + 1; flight 0 starts at time 0. Rows with
    fewer bounces than the longest are padded with time infinity. Empty object slots
    hold values that mean nothing.

    Attributes:
        start: when each flight starts.
        position: (x, y) of each centroid then, before any pan.
        velocity: (x, y) then, just after the bounce.
        gravity: downward acceleration.
        limits: smallest and largest (x, y) of each centroid inside the walls.
        time: of each bounce, in order.
        kind: WALL_X, WALL_Y or PAIR.
        first: slot of the object that bounces.
        second: slot of the other object of a pair, -1 at a wall.
        impact: change of the normal (relative) velocity, which sets the loudness.
    """

    start: Float[np.ndarray, "b flights"]
    position: Float[np.ndarray, "b flights o 2"]
    velocity: Float[np.ndarray, "b flights o 2"]
    gravity: Float[np.ndarray, " b"]
    limits: Float[np.ndarray, "b o 2 2"]
    time: Float[np.ndarray, "b e"]
    kind: Int[np.ndarray, "b e"]
    first: Int[np.ndarray, "b e"]
    second: Int[np.ndarray, "b e"]
    impact: Float[np.ndarray, "b e"]

    def positions(self, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, "b t o 2"]:
        """Where the centroids are at each time, before any pan."""
        rows, flight, elapsed = self._flights(times)
        fallen = 0.5 * self.gravity[:, None, None] * elapsed[..., 0] ** 2
        position = self.position[rows, flight] + self.velocity[rows, flight] * elapsed
        position[..., 1] += fallen
        # Bites only by rounding, or after the last bounce.
        return np.clip(position, self.limits[:, None, :, 0], self.limits[:, None, :, 1])

    def velocities(
        self, times: Float[np.ndarray, " t"]
    ) -> Float[np.ndarray, "b t o 2"]:
        """How fast the centroids move at each time."""
        rows, flight, elapsed = self._flights(times)
        velocity = self.velocity[rows, flight]
        velocity[..., 1] += self.gravity[:, None, None] * elapsed[..., 0]
        return velocity

    def _flights(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row index, flight index and time since its start, broadcastable."""
        flight = (self.start[:, None] <= times[:, None]).sum(-1) - 1
        rows = np.arange(len(flight))[:, None]
        return rows, flight, (times - self.start[rows, flight])[..., None, None]


def simulate(
    scenes: Scenes, duration: float, *, restitution: float | tuple[float, float] = 1.0
) -> Motion:
    """Moves the scenes from time 0 on.

    After several times the bounces that scenes need, their objects stop at the walls
    and pass through one another, which ends the ever smaller hops of a restitution
    below 1.

    Args:
        scenes: where everything starts.
        duration: seconds; bounces from then on are not looked for.
        restitution: speed after over speed before a bounce, or that at walls and that
            between objects. The world's is 1; other values make counterfactual clips to
            test an evaluation with.
    """
    rows = len(scenes.ids)
    position, velocity = scenes.position.copy(), scenes.velocity.copy()
    gravity = np.where(scenes.gravity, GRAVITY, 0.0)
    limits, present, mass = scenes.limits, scenes.present, scenes.radius**2
    pull = np.stack([np.zeros(rows), gravity], -1)[:, None]
    paired = present[:, _FIRST] & present[:, _SECOND]
    touching = (scenes.radius[:, _FIRST] + scenes.radius[:, _SECOND]) ** 2
    kept = tuple(np.broadcast_to(restitution, 2).tolist())
    row, now = np.arange(rows), np.zeros(rows)
    flights, bounces = [(now, position, velocity)], []
    while len(bounces) < 64 + int(64 * duration):
        with np.errstate(divide="ignore", invalid="ignore"):
            walls = _wall_waits(position, velocity, pull, limits, present)
            pairs = _pair_waits(position, velocity, touching, paired)
        waits = np.concatenate([walls.reshape(rows, 2 * MAX_OBJECTS), pairs], 1)
        event = waits.argmin(1)
        wait = waits[row, event]
        live = now + wait < duration
        if not live.any():
            break
        wait = np.where(live, wait, 0.0)
        now = np.where(live, now + wait, now)
        elapsed = wait[:, None]
        position = position + velocity * elapsed[..., None]
        position[..., 1] += 0.5 * gravity[:, None] * elapsed**2
        velocity = velocity.copy()
        velocity[..., 1] += gravity[:, None] * elapsed
        bounce = _bounce(event, live, position, velocity, limits, mass, kept)
        time = np.where(live, now, np.inf)
        flights.append((time, position, velocity))
        bounces.append((time, *bounce))
    start, positions, velocities = (np.stack(x, 1) for x in zip(*flights, strict=True))
    events = [np.empty((rows, 0), kind) for kind in (float, int, int, int, float)]
    if bounces:
        events = [np.stack(x, 1) for x in zip(*bounces, strict=True)]
    return Motion(start, positions, velocities, gravity, limits, *events)


def _wall_waits(position, velocity, pull, limits, present) -> np.ndarray:
    """Time until each object meets a wall across x and one across y: b o 2."""
    to_low = np.maximum(position - limits[:, :, 0], 0)
    to_high = np.maximum(limits[:, :, 1] - position, 0)
    # Both roots in the forms that neither cancel nor need a case without gravity.
    energy, pull = velocity * velocity, 2 * pull
    root = np.sqrt(energy + pull * to_high)
    downwards, upwards = 2 * to_high / (velocity + root), (root - velocity) / (pull / 2)
    falling = np.where(velocity > 0, downwards, upwards)
    square = energy - pull * to_low
    rising = 2 * to_low / (np.sqrt(np.maximum(square, 0)) - velocity)
    rising[(velocity >= 0) | (square < 0)] = np.inf
    waits = np.fmin(falling, rising)
    waits[~(present[..., None] & (waits >= 0))] = np.inf  # drops NaN
    return waits


def _pair_waits(position, velocity, touching, paired) -> np.ndarray:
    """Time until the discs of each pair of objects touch; gravity cancels."""
    x, y = np.moveaxis(position.take(_FIRST, 1) - position.take(_SECOND, 1), -1, 0)
    u, v = np.moveaxis(velocity.take(_FIRST, 1) - velocity.take(_SECOND, 1), -1, 0)
    approach = x * u + y * v
    gap = x * x + y * y - touching
    root = approach * approach - (u * u + v * v) * gap
    wait = np.maximum(gap, 0) / (np.sqrt(np.maximum(root, 0)) - approach)
    wait[~((approach < 0) & (root > 0) & paired)] = np.inf
    return wait


def _bounce(
    event, live, position, velocity, limits, mass, restitution
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Applies each live row's event in place; returns kind, first, second, impact."""
    at_walls, of_pairs = restitution
    kind, first, second = (np.full(len(event), x) for x in (WALL_X, 0, -1))
    impact = np.zeros(len(event))
    walls = 2 * MAX_OBJECTS

    row = np.flatnonzero(live & (event < walls))
    item, axis = event[row] >> 1, event[row] & 1
    at = row, item, axis
    normal = velocity[at]
    position[at] = limits[row, item, (normal > 0).view(np.int8), axis]
    velocity[at] = -at_walls * normal
    kind[row], first[row] = axis, item  # WALL_X or WALL_Y
    impact[row] = (1 + at_walls) * np.abs(normal)

    row = np.flatnonzero(live & (event >= walls))
    if not len(row):
        return kind, first, second, impact
    one, two = _FIRST[event[row] - walls], _SECOND[event[row] - walls]
    apart = position[row, one] - position[row, two]
    apart /= np.sqrt((apart**2).sum(-1, keepdims=True))
    normal = ((velocity[row, one] - velocity[row, two]) * apart).sum(-1)
    change = (1 + of_pairs) * normal
    share = mass[row, two] / (mass[row, one] + mass[row, two])
    velocity[row, one] -= (share * change)[:, None] * apart
    velocity[row, two] += ((1 - share) * change)[:, None] * apart
    kind[row], first[row], second[row] = PAIR, one, two
    impact[row] = np.abs(change)
    return kind, first, second, impact
