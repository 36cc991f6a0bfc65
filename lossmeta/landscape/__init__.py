"""What a loss looks like around a model: surfaces, and their curvature."""

from lossmeta.landscape.curvature import Curvature, CurvatureTracker, exact_curvature
from lossmeta.landscape.directions import Direction, Trajectory, line, pca_directions, random_directions
from lossmeta.landscape.plots import plot_index, plot_surface
from lossmeta.landscape.sampling import loss_surface
from lossmeta.landscape.surface import LossSurface

__all__ = [
    "Curvature",
    "CurvatureTracker",
    "Direction",
    "LossSurface",
    "Trajectory",
    "exact_curvature",
    "line",
    "loss_surface",
    "pca_directions",
    "plot_index",
    "plot_surface",
    "random_directions",
]
