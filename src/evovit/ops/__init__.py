"""Pure tensor functions the methods are written in: score, select, update. No modules, no state."""
