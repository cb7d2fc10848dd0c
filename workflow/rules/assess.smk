# Areas: from a probability sample where there is one, else map areas that say so.
if CAMPAIGN.sample:
    # Answers come after the draw and must not redo it.
    DRAW_KEYS = [
        f"sample.{key}"
        for key in type(CAMPAIGN.sample).model_fields
        if key not in ("answers", "primary", "max_unclear_pct", "page")
    ]

    rule draw_sample:
        input:
            map="results/map/map.json",
            class_map=PLAN.product_files[0],
            given=PLAN.sample_files,
        output:
            "results/map/sample.gpkg",
            "results/map/design.json",
            "results/map/allocation.csv",
        log:
            "logs/draw_sample.log",
        benchmark:
            "benchmarks/draw_sample.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2000),
            runtime=minutes(30),
        params:
            config=keys(*DRAW_KEYS, "seed", "tasks"),
            code=code_digest("assess.sampling"),
        message:
            "Draw the probability sample from the map"
        shell:
            "terraloom draw-sample --campaign work/campaign.yaml > {log} 2>&1"

    rule write_labelling_page:
        input:
            map="results/map/map.json",
            class_map=PLAN.product_files[0],
            cubes=expand("work/cube/{batch}.json", batch=BATCHES),
            sample="results/map/sample.gpkg",
            design="results/map/design.json",
        output:
            "results/map/labelling.html",
        log:
            "logs/write_labelling_page.log",
        benchmark:
            "benchmarks/write_labelling_page.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(3000),
            runtime=minutes(30),
        params:
            config=keys("sample.page", "tasks", "name", "title", "grid", "aoi"),
            templates=files_digest("report/templates"),
            code=code_digest("report.labelling"),
        message:
            "Write the page to answer the sample on"
        shell:
            "terraloom write-labelling-page --campaign work/campaign.yaml > {log} 2>&1"


rule estimate_areas:
    input:
        map="results/map/map.json",
        sample=(
            [
                "results/map/sample.gpkg",
                "results/map/design.json",
                *PLAN.answer_files,
            ]
            if CAMPAIGN.sample
            else []
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


if CAMPAIGN.regions:

    rule aggregate_regions:
        input:
            map="results/map/map.json",
            products=PLAN.product_files,
            covariance="results/model/covariance.json",
            regions=CAMPAIGN.regions.file,
            tiles=expand("work/predict/{batch}.json", batch=BATCHES),
        output:
            table="results/map/regions.csv",
            polygons="results/map/regions.gpkg",
            facts="results/map/regions.json",
        log:
            "logs/aggregate_regions.log",
        benchmark:
            "benchmarks/aggregate_regions.tsv"
        threads: 2
        resources:
            mem_mb=mem_mb(3000),
            runtime=minutes(60),
        params:
            config=keys("regions", "tasks", "uncertainty.applicability"),
            code=code_digest("assess.regions"),
        message:
            "Areas, means and totals of the regions"
        shell:
            "terraloom aggregate-regions --campaign work/campaign.yaml > {log} 2>&1"


if CAMPAIGN.archive.kind == "simulated":

    rule score_rehearsal:
        input:
            map="results/map/map.json",
            accuracy="results/map/accuracy.json",
            quality="results/scenes/quality.csv",
            held_out="results/model/held_out.json",
            labels="results/chips/labels.json",
            regions="results/map/regions.json" if CAMPAIGN.regions else [],
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
            config=keys("tasks", "grid", "regions"),
            code=code_digest("assess.rehearsal"),
        message:
            "Compare every stage with the simulated truth"
        shell:
            "terraloom score-rehearsal --campaign work/campaign.yaml > {log} 2>&1"
