"""Human feedback: which pairs to label, the label page, labels on disk, how well annotators agree, a model as judge.

choose: what to label next    pairs, labels: on disk    desk, page: the label page    exchange: export, import
agreement: of annotators      judge, replies: an endpoint compares two policies      win_rate: what it found
"""
