"""One recipe under several arms, on the same seeds, data and initial weights, into one report.

    runs/ablation-NAME/ablation.json          what was asked for
    runs/ablation-NAME/ARM/seed-N/            an ordinary run directory, and log.txt
    runs/ablation-NAME/report.html, summary.json

Each run is a process of its own, one after the other. The same command again goes on where it ended. A seed decides data order
and sampling; data and initial weights are the recipe's.
"""
