"""One small file per runner of the comparison, and the harness that runs them under a cgroup.

Does not know the runtime's insides: ours is one runner among the others.
"""
