"""The theory of OVQ as a scikit-learn estimator; `pip install 'ovq[theory]'`."""

from ovq.gmr.regressor import ASSIGNMENTS, MERGES, GaussianMixtureRegressor

__all__ = ["ASSIGNMENTS", "MERGES", "GaussianMixtureRegressor"]
