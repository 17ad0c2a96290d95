"""`SamplingParams` under the name that FastDeploy publishes, of `fastdeploy.sampling`."""

from fastdeploy.sampling import GuidedDecodingParams, SamplingParams

__all__ = ["GuidedDecodingParams", "SamplingParams"]
