"""The part of the JobSet API (jobset.x-k8s.io/v1alpha2) around its Jobs, as a JSON schema.

Written from the API reference of JobSet 0.10. What is not named here is refused, as a cluster
refuses it. Jobs and pods are left to the schemas of Kubernetes itself.
"""

NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
COUNT = {"type": "integer", "minimum": 0}
STRINGS = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: str, **properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _choice(*values: str) -> dict:
    return {"enum": list(values)}


RULE = _object(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=_choice(
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    ),
    onJobFailureReasons={
        "type": "array",
        "uniqueItems": True,
        "items": _choice(
            "BackoffLimitExceeded",
            "DeadlineExceeded",
            "FailedIndexes",
            "MaxFailedIndexesExceeded",
            "PodFailurePolicy",
        ),
    },
    onJobFailureMessagePatterns=STRINGS,
    targetReplicatedJobs=STRINGS,
)
REPLICATED_JOB = _object(
    "name template",
    name=NAME,
    groupName=NAME,
    replicas=COUNT,
    dependsOn={
        "type": "array",
        "maxItems": 5,
        "items": _object("name status", name=NAME, status=_choice("Ready", "Complete")),
    },
    template=_object("spec", metadata={"type": "object"}, spec={"type": "object"}),
)
JOBSET = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS),
    spec=_object(
        "replicatedJobs",
        replicatedJobs={"type": "array", "items": REPLICATED_JOB, "minItems": 1},
        network=_object(
            "",
            enableDNSHostnames={"type": "boolean"},
            subdomain=NAME,
            publishNotReadyAddresses={"type": "boolean"},
        ),
        successPolicy=_object(
            "operator", operator=_choice("All", "Any"), targetReplicatedJobs=STRINGS
        ),
        failurePolicy=_object(
            "",
            maxRestarts=COUNT,
            restartStrategy=_choice("Recreate", "BlockingRecreate", "InPlaceRestart"),
            rules={"type": "array", "items": RULE},
        ),
        startupPolicy=_object(
            "startupPolicyOrder", startupPolicyOrder=_choice("AnyOrder", "InOrder")
        ),
        suspend={"type": "boolean"},
        coordinator=_object("replicatedJob", replicatedJob=NAME, jobIndex=COUNT, podIndex=COUNT),
        managedBy={"type": "string"},
        ttlSecondsAfterFinished=COUNT,
    ),
)
