"""How fast one EM iteration is, beside what a user would reach for instead: ``make bench``."""
