"""From text to objects: names of components, the published recipe, and which settings make a search what it is."""
