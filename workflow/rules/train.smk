# One job per fold trains its members; then the ensemble is calibrated on held-out folds.
if building("model"):

    rule train_fold:
        input:
            chips="results/chips/chips.zip",
        output:
            "results/model/fold-{fold}/card.json",
        log:
            "logs/train_fold/{fold}.log",
        benchmark:
            "benchmarks/train_fold/{fold}.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(3000),
            runtime=minutes(240),
        params:
            config=keys(
                "tasks",
                "seed",
                "folds.count",
                "model.members",
                "model.width",
                "model.epochs",
                "model.batch",
                "model.learning_rate",
            ),
            code=code_digest("train.run"),
        message:
            "Train the members that do not see fold {wildcards.fold}"
        shell:
            "terraloom train-fold --campaign work/campaign.yaml --fold {wildcards.fold} "
            "> {log} 2>&1"

    rule fit_baseline:
        input:
            chips="results/chips/chips.zip",
            folds="results/chips/folds.gpkg",
            labels="results/chips/labels.json",
            quality="results/scenes/quality.csv",
            shifts="results/scenes/shifts.json",
        output:
            "results/model/baseline.json",
        log:
            "logs/fit_baseline.log",
        benchmark:
            "benchmarks/fit_baseline.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(3000),
            runtime=minutes(60),
        params:
            config=keys("tasks", "seed", "folds.count", "model.baseline"),
            code=code_digest("assess.held_out"),
        message:
            "Fit the per-pixel random forest on the same folds"
        shell:
            "terraloom fit-baseline --campaign work/campaign.yaml > {log} 2>&1"

    rule calibrate:
        input:
            chips="results/chips/chips.zip",
            cards=expand("results/model/fold-{fold}/card.json", fold=FOLDS),
            baseline="results/model/baseline.json" if CAMPAIGN.model.baseline else [],
        output:
            calibration="results/model/calibration.json",
            held_out="results/model/held_out.json",
            metrics="results/model/metrics.json",
            reliability="results/model/reliability.csv",
            history="results/model/history.csv",
        log:
            "logs/calibrate.log",
        benchmark:
            "benchmarks/calibrate.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(3000),
            runtime=minutes(60),
        params:
            config=keys(
                "tasks", "seed", "folds.count", "model.members", "model.label_noise"
            ),
            code=code_digest("assess.held_out"),
        message:
            "Calibrate the ensemble on folds that did not train, and score it there"
        shell:
            "terraloom calibrate --campaign work/campaign.yaml > {log} 2>&1"
