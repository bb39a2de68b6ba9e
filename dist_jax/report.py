"""What a person looks at: summaries on the console, curves and tables as a page."""


def write_report(workdir, summary, result, class_names):
    pass


def write_evaluation(folder, figures, result, class_names):
    pass


def print_summary(workdir, summary):
    print(summary)


def print_evaluation(figures):
    print({k: v for k, v in figures.items() if k != 'per_class'})
