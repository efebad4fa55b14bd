"""The ReLU-reduction methods of the papers: each makes plans, or model specs and plans, from a model and a budget."""
