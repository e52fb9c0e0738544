"""The interactive widgets. The browser computes and draws; Python sends the data and checks.

What is drawn stands in ``js/``: pure arithmetic in ``arithmetic.js``, what all explorers share in
``view.js``, one file for each explorer. Tests compare the arithmetic with torch.
"""
