# Areas: from a probability sample where there is one, else map areas that say so.
if CAMPAIGN.sample:

    rule draw_sample:
        input:
            map="results/map/map.json",
            class_map=PLAN.product_files[0],
        output:
            "results/map/sample.gpkg",
            "results/map/design.json",
        log:
            "logs/draw_sample.log",
        benchmark:
            "benchmarks/draw_sample.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2000),
            runtime=minutes(30),
        params:
            config=keys("sample", "seed", "tasks"),
            code=code_digest("assess.run"),
        message:
            "Draw the probability sample from the map"
        shell:
            "terraloom draw-sample --campaign work/campaign.yaml > {log} 2>&1"


rule estimate_areas:
    input:
        map="results/map/map.json",
        sample=(
            ["results/map/sample.gpkg", *PLAN.answer_files] if CAMPAIGN.sample else []
        ),
    output:
        areas="results/map/areas.csv",
        accuracy="results/map/accuracy.json",
        metrics="results/map/metrics.json",
    log:
        "logs/estimate_areas.log",
    benchmark:
        "benchmarks/estimate_areas.tsv"
    threads: 1
    resources:
        mem_mb=mem_mb(2000),
        runtime=minutes(30),
    params:
        config=keys("sample", "tasks"),
        code=code_digest("assess.run"),
    message:
        "Estimate the areas"
    shell:
        "terraloom estimate-areas --campaign work/campaign.yaml > {log} 2>&1"


if CAMPAIGN.archive.kind == "simulated":

    rule score_rehearsal:
        input:
            map="results/map/map.json",
            accuracy="results/map/accuracy.json",
            quality="results/scenes/quality.csv",
            held_out="results/model/held_out.json",
            labels="results/chips/labels.json",
            truth="resources/simulated/truth/truth.json",
        output:
            "results/map/scoreboard.json",
        log:
            "logs/score_rehearsal.log",
        benchmark:
            "benchmarks/score_rehearsal.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(4000),
            runtime=minutes(30),
        params:
            config=keys("tasks", "grid"),
            code=code_digest("assess.rehearsal"),
        message:
            "Compare every stage with the simulated truth"
        shell:
            "terraloom score-rehearsal --campaign work/campaign.yaml > {log} 2>&1"
