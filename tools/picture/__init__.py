"""What visualize.py alone uses: the view of a graph, its drawing, and the page around it."""
