"""What a loss looks like around a model: surfaces, their curvature, and the spectrum of its Hessian."""

from lossmeta.landscape.curvature import Curvature, CurvatureTracker, exact_curvature
from lossmeta.landscape.density import SpectralDensity, hessian_density
from lossmeta.landscape.directions import Direction, Trajectory, line, pca_directions, random_directions
from lossmeta.landscape.plots import plot_index, plot_surface
from lossmeta.landscape.sampling import loss_surface
from lossmeta.landscape.spectrum import Eigenpairs, Estimate, hessian_eigenvalues, hessian_trace
from lossmeta.landscape.surface import LossSurface

__all__ = [
    "Curvature",
    "CurvatureTracker",
    "Direction",
    "Eigenpairs",
    "Estimate",
    "LossSurface",
    "SpectralDensity",
    "Trajectory",
    "exact_curvature",
    "hessian_density",
    "hessian_eigenvalues",
    "hessian_trace",
    "line",
    "loss_surface",
    "pca_directions",
    "plot_index",
    "plot_surface",
    "random_directions",
]
