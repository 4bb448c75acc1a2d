"""The theory of OVQ as a scikit-learn estimator; `pip install './lab[theory]'`."""

from ovq_lab.gmr.regressor import ASSIGNMENTS, MERGES, GaussianMixtureRegressor

__all__ = ["ASSIGNMENTS", "MERGES", "GaussianMixtureRegressor"]
