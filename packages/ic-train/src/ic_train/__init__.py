"""InfiniteContext: training and evaluation."""
