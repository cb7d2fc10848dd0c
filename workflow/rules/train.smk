# One job per member; then the ensemble is calibrated on held-out folds.
if building("model"):

    if CAMPAIGN.model.search:

        rule search_settings:
            input:
                chips="results/chips/chips.zip",
            output:
                "work/search/fold-{fold}/best.json",
            log:
                "logs/search_settings/{fold}.log",
            benchmark:
                "benchmarks/search_settings/{fold}.tsv"
            threads: 1
            resources:
                mem_mb=mem_mb(3000),
                runtime=minutes(240),
            params:
                config=keys("tasks", "seed", "folds", *TRAIN_KEYS),
                code=code_digest("train.search"),
            message:
                "Search settings for the members that do not see fold {wildcards.fold}"
            shell:
                "terraloom search-settings --campaign work/campaign.yaml "
                "--fold {wildcards.fold} > {log} 2>&1"

    rule train_member:
        input:
            PLAN.weight_files,
            "work/search/fold-{fold}/best.json" if CAMPAIGN.model.search else [],
            chips="results/chips/chips.zip",
            folds="results/chips/folds.gpkg",
        output:
            "results/model/fold-{fold}/member-{member}.safetensors",
            "results/model/fold-{fold}/member-{member}.json",
        log:
            "logs/train_member/{fold}-{member}.log",
        benchmark:
            "benchmarks/train_member/{fold}-{member}.tsv"
        threads: CAMPAIGN.model.processes
        resources:
            mem_mb=mem_mb(3000),
            runtime=minutes(240),
        params:
            config=keys("tasks", "seed", "folds", "cube.periods", *TRAIN_KEYS),
            code=code_digest("train.run"),
        message:
            "Train member {wildcards.member} of those that do not see fold {wildcards.fold}"
        shell:
            "terraloom train-member --campaign work/campaign.yaml --fold {wildcards.fold} "
            "--member {wildcards.member} > {log} 2>&1"

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
            config=keys(
                "tasks", "seed", "folds.count", "folds.buffer_m", "model.baseline"
            ),
            code=code_digest("assess.forest"),
        message:
            "Fit the per-pixel random forest on the same folds"
        shell:
            "terraloom fit-baseline --campaign work/campaign.yaml > {log} 2>&1"

    rule calibrate:
        input:
            chips="results/chips/chips.zip",
            folds="results/chips/folds.gpkg",
            labels="results/chips/labels.json",
            metrics="results/chips/metrics.json",
            cards=CARDS,
            baseline="results/model/baseline.json" if CAMPAIGN.model.baseline else [],
        output:
            calibration="results/model/calibration.json",
            trust=PLAN.trust_files,
            held_out="results/model/held_out.json",
            metrics="results/model/metrics.json",
            reliability="results/model/reliability.csv",
            history="results/model/history.csv",
            suspects="results/model/suspects.gpkg",
            covariance="results/model/covariance.json",
            card="results/model/model_card.md",
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
                "chips",
                "cube.periods",
                "tasks",
                "seed",
                "folds",
                "model.members",
                "model.label_noise",
                "model.calibration",
                "uncertainty",
            ),
            code=code_digest("assess.held_out"),
        message:
            "Calibrate the ensemble on folds that did not train, and score it there"
        shell:
            "terraloom calibrate --campaign work/campaign.yaml > {log} 2>&1"
