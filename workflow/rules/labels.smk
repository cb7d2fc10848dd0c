# Labels onto the grid, spatial folds, training chips.
if building("chips"):

    rule align_labels:
        input:
            PLAN.label_files,
        output:
            folds="results/chips/folds.gpkg",
            report="results/chips/labels.json",
        log:
            "logs/align_labels.log",
        benchmark:
            "benchmarks/align_labels.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2000),
            runtime=minutes(30),
        params:
            config=keys("aoi", "grid", "tasks", "folds", "seed"),
            code=code_digest("labels.align"),
        message:
            "Read and align the labels, divide them into spatial folds"
        shell:
            "terraloom align-labels --campaign work/campaign.yaml > {log} 2>&1"

    rule cut_chips:
        input:
            folds="results/chips/folds.gpkg",
            labels=PLAN.label_files,
            cubes=expand("work/cube/{batch}.json", batch=BATCHES),
        output:
            chips="results/chips/chips.zip",
            metrics="results/chips/metrics.json",
        log:
            "logs/cut_chips.log",
        benchmark:
            "benchmarks/cut_chips.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(3000),
            runtime=minutes(60),
        params:
            config=keys("aoi", "grid", "tasks", "folds", "chips", "seed"),
            code=code_digest("labels.chips", "preprocess.cube"),
        message:
            "Cut the training chips"
        shell:
            "terraloom cut-chips --campaign work/campaign.yaml > {log} 2>&1"
