"""The curvature method: options made and priced under second moments of inputs and gradients."""
