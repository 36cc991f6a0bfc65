"""What a loss looks like around a model: surfaces, their curvature, and the Hessian's spectrum."""
