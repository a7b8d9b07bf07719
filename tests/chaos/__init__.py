"""Chaos: a run is hit at every stage and at any instant; afterwards everything must still be true.

python -m tests.chaos --seconds 3600            # as long as one likes
python -m tests.chaos --seed 7 --only 123       # one injection again, the same again
"""
