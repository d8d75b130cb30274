"""transferops inside other frameworks: a module for each, named after the package it needs, imported on demand only.

* :mod:`transferops.integrations.sklearn` - heads as scikit-learn estimators
* :mod:`transferops.integrations.lightning` - callbacks: scores of labelled data, OTQMS sampling
* :mod:`transferops.integrations.transformers` - the same scores in Hugging Face's ``Trainer``
* :mod:`transferops.integrations.datasets` - domains from Hugging Face data sets
* :mod:`transferops.integrations.laplace` - the Fisher information as a back end of laplace-torch
* :mod:`transferops.integrations.curvlinops` - as a linear operator of curvlinops
* :mod:`transferops.integrations.scipy` - as a linear operator of SciPy
* :mod:`transferops.integrations.backpack` - BackPACK's extensions on the kernels of this library
"""
