// Reads a GGUF file with llama.cpp itself, on the CPU, and says what it computes.
//
// node node_llama_cpp.mjs MODULES REQUEST.json ANSWERS.json: the folder of node-llama-cpp, and a list of jobs, each
// {model, lora?, text?, special?, ids?, generate?, logprobs?}.
// Writes, for each job, the ids of `text`, the ids of `generate` greedy tokens after
// `ids` (or after the ids of the text), and the pairs of token and log-probability after each of `ids`.
// Keys and values are kept in fp32, so that what differs is the file.
import {readFileSync, writeFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [modules, request, answers] = process.argv.slice(2);
const entry = pathToFileURL(join(modules, "node-llama-cpp", "dist", "index.js"));
const {getLlama, LlamaLogLevel} = await import(entry);
const jobs = JSON.parse(readFileSync(request, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const results = [];

async function probabilities(sequence, ids) {
    // Nothing is filtered out of the probabilities.
    const all = {temperature: 1, topK: 0, topP: 1, minP: 0};
    const options = {generateNext: {probabilities: true, options: all}};
    const found = await sequence.controlledEvaluate(ids.map((id) => [id, options]));
    return found.map(({next}) => next.probabilities);
}

for (const job of jobs) {
    const model = await llama.loadModel({modelPath: job.model, gpuLayers: 0, useMmap: false});
    const result = {};
    const ids = job.ids ?? model.tokenize(job.text ?? "", true);
    result.tokens = job.text == null ? null : Array.from(model.tokenize(job.text, job.special ?? false));
    if (job.logprobs || job.generate) {
        const context = await model.createContext({
            contextSize: job.context ?? 256,
            threads: 1,
            lora: job.lora == null ? undefined : {adapters: [{filePath: job.lora, scale: 1}]},
            experimentalKvCacheKeyType: "F32",
            experimentalKvCacheValueType: "F32",
            flashAttention: false
        });
        const sequence = context.getSequence();
        let rows = await probabilities(sequence, ids);
        if (job.logprobs)
            result.logprobs = rows.map((row) =>
                [...row].filter(([, value]) => value > 0).map(([token, value]) => [token, Math.log(value)]));
        result.generated = [];
        for (let i = 0; i < (job.generate ?? 0); i++) {
            const [best] = rows.at(-1).keys();
            result.generated.push(best);
            if (i + 1 < job.generate)
                rows = await probabilities(sequence, [best]);
        }
        await context.dispose();
    }
    results.push(result);
    await model.dispose();
}
writeFileSync(answers, JSON.stringify(results));
process.exit(0);
