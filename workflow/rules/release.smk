# What people open: the catalogue of products and the report.
rule catalogue_products:
    input:
        PLAN.polygon_files,
        map="results/map/map.json",
        accuracy="results/map/accuracy.json",
        held_out="results/model/held_out.json",
        lock="results/scenes/items.json",
    output:
        "results/map/stac/catalog.json",
    log:
        "logs/catalogue_products.log",
    benchmark:
        "benchmarks/catalogue_products.tsv"
    threads: 1
    resources:
        mem_mb=mem_mb(1000),
        runtime=minutes(10),
    params:
        config=PLAN.digest,
        code=code_digest("report.catalogue"),
    message:
        "Write the STAC catalogue of the products"
    shell:
        "terraloom catalogue-products --campaign work/campaign.yaml > {log} 2>&1"


rule build_report:
    input:
        MILESTONES["scenes"],
        MILESTONES["chips"],
        MILESTONES["model"],
        MILESTONES["map"],
        catalogue="results/map/stac/catalog.json",
    output:
        report(
            "results/map/report.html",
            category="Report",
            caption="../report/report.rst",
        ),
    log:
        "logs/build_report.log",
    benchmark:
        "benchmarks/build_report.tsv"
    threads: 1
    resources:
        mem_mb=mem_mb(2000),
        runtime=minutes(20),
    params:
        config=PLAN.digest,
        templates=files_digest("report/templates"),
        code=code_digest("report.page"),
    message:
        "Write the report"
    shell:
        "terraloom build-report --campaign work/campaign.yaml > {log} 2>&1"
