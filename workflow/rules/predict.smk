# All members over all tiles, then one raster per product.
AGREEMENT = (
    "results/model/onnx/agreement-int8.json"
    if CAMPAIGN.predict.runtime == "onnx-int8"
    else "results/model/onnx/agreement.json"
)


rule export_model:
    input:
        CARDS,
        calibration="results/model/calibration.json",
        chips="results/chips/chips.zip",
    output:
        AGREEMENT,
    log:
        "logs/export_model.log",
    benchmark:
        "benchmarks/export_model.tsv"
    threads: CAMPAIGN.predict.threads
    resources:
        mem_mb=mem_mb(3000),
        runtime=minutes(60),
    params:
        config=keys("predict.runtime"),
        code=code_digest("predict.export"),
    message:
        "Export the networks to ONNX and compare"
    shell:
        "terraloom export-model --campaign work/campaign.yaml > {log} 2>&1"


rule predict_tiles:
    input:
        calibration="results/model/calibration.json",
        cards=CARDS,
        trust=PLAN.trust_files,
        onnx=AGREEMENT if CAMPAIGN.predict.runtime != "torch" else [],
        cubes=lambda wildcards: expand(
            "work/cube/{batch}.json", batch=PLAN.around(wildcards.batch)
        ),
    output:
        "work/predict/{batch}.json",
    log:
        "logs/predict_tiles/{batch}.log",
    benchmark:
        "benchmarks/predict_tiles/{batch}.tsv"
    threads: CAMPAIGN.predict.threads
    resources:
        mem_mb=mem_mb(3000),
        runtime=minutes(120, per_tile=2),
    params:
        config=keys(
            "aoi",
            "grid",
            "tasks",
            "predict",
            "products.probability_bits",
            "uncertainty.sets",
            "uncertainty.applicability",
        ),
        spread=CAMPAIGN.regions is not None,
        code=code_digest("predict.engine"),
    message:
        "Predict the tiles of {wildcards.batch}"
    shell:
        "terraloom predict-tiles --campaign work/campaign.yaml --batch {wildcards.batch} "
        "> {log} 2>&1"


if CAMPAIGN.products.layout == "tiles":

    rule write_tiles:
        input:
            CARDS,
            expand("work/cube/{batch}.json", batch=BATCHES),
            tiles="work/predict/{batch}.json",
            lock="results/scenes/items.json",
            labels="results/chips/folds.gpkg",
        output:
            "results/map/tiles/{batch}.json",
        log:
            "logs/write_tiles/{batch}.log",
        benchmark:
            "benchmarks/write_tiles/{batch}.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2000),
            runtime=minutes(60, per_tile=1),
        params:
            config=PLAN.map_digest,
            code=code_digest("predict.tile_products"),
        message:
            "Write the products of the tiles of {wildcards.batch}"
        shell:
            "terraloom write-tiles --campaign work/campaign.yaml "
            "--batch {wildcards.batch} > {log} 2>&1"


rule mosaic_products:
    input:
        CARDS,
        (
            expand("results/map/tiles/{batch}.json", batch=BATCHES)
            if CAMPAIGN.products.layout == "tiles"
            else []
        ),
        tiles=expand("work/predict/{batch}.json", batch=BATCHES),
        lock="results/scenes/items.json",
        labels="results/chips/folds.gpkg",
    output:
        PLAN.product_files,
        map="results/map/map.json",
        cover="results/map/tiles.csv",
    log:
        "logs/mosaic_products.log",
    benchmark:
        "benchmarks/mosaic_products.tsv"
    threads: 1
    resources:
        mem_mb=mem_mb(2000),
        runtime=minutes(120),
    params:
        config=PLAN.map_digest,
        code=code_digest("predict.products"),
    message:
        "Join the tiles into products"
    shell:
        "terraloom mosaic-products --campaign work/campaign.yaml > {log} 2>&1"


if CAMPAIGN.products.vector:

    rule polygonise_map:
        input:
            PLAN.product_files,
            map="results/map/map.json",
        output:
            "results/map/class_map.gpkg",
        log:
            "logs/polygonise_map.log",
        benchmark:
            "benchmarks/polygonise_map.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(3000),
            runtime=minutes(120),
        params:
            config=PLAN.map_digest,
            code=code_digest("predict.polygons"),
        message:
            "Write the class map as polygons"
        shell:
            "terraloom polygonise-map --campaign work/campaign.yaml > {log} 2>&1"
