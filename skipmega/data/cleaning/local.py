"""All tasks of a cleaning on one machine."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from skipmega.data.cleaning.config import CleaningConfig
from skipmega.data.cleaning.records import TaskRecord
from skipmega.data.cleaning.report import CleaningReport, write_report
from skipmega.data.cleaning.stages import STAGES, check_cleaning, count_tasks, run_task
from skipmega.errors import DataError


def clean(config: CleaningConfig, workers: int) -> CleaningReport:
    """Do what is left of a cleaning, on ``workers`` processes, and sum it up.

    Raises:
        DataError, ConfigError: as :func:`skipmega.data.cleaning.stages.run_task`; or a process died.
    """
    check_cleaning(config)
    for stage in STAGES:
        tasks = range(count_tasks(config, stage))
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))
        try:
            running = [pool.submit(run_task, config, stage, number) for number in tasks]
            for done, task in enumerate(as_completed(running), start=1):
                _tell(task.result(), done, len(tasks))
        except BrokenProcessPool:
            raise DataError(
                f"one of {workers} processes of stage {stage} died, probably out of memory: use fewer, "
                "or more shards or deduplicate.partitions; what is finished stays"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return write_report(config)


def _tell(record: TaskRecord, done: int, tasks: int) -> None:
    kept = (
        f": {record.kept.documents} of {record.given.documents} documents" if record.given.documents else ""
    )
    print(f"{record.stage}: task {record.number}{kept} ({done} of {tasks} done)", file=sys.stderr, flush=True)
