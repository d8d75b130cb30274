"""The scores under the names and signatures that other libraries gave them, to change one import and nothing else.

* :mod:`transferops.compat.tllib` - the functions of ``tllib.ranking``
* :mod:`transferops.compat.logme` - the class of the LogME repository
* :mod:`transferops.compat.transformer_ranker` - the estimators of ``transformer_ranker.estimators``

Every one is a call of :mod:`transferops.scores` and returns its value as a float. Where a peer departs from the
published formula the value differs; each module says where. What the scores refuse (NaN, no samples, labels that are
not integers) is refused here too, in the words of :mod:`transferops.scores`.
"""
