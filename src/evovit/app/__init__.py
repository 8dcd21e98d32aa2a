"""The web page of `evovit app`: a photograph, dense and reduced, with sliders."""
