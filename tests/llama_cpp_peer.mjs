// llama.cpp's answers about one vocabulary, for llama_cpp_peer.py: {texts, special, ids} as JSON in, JSON out.
import { json } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const [library, modelPath] = process.argv.slice(2);
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(library));
const log = [];
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false,
    logLevel: LlamaLogLevel.info, logger: (level, line) => log.push(line),
});
const model = await llama.loadModel({ modelPath, vocabOnly: true }).catch((error) => {
    console.error(log.join("\n"));
    throw error;
});

// Everything but its size the vocabulary tells when asked; that one llama.cpp only prints, a moment late.
const size = () => log.join("\n").match(/n_vocab *= (\d+)/)?.[1];
for (let i = 0; !size() && i < 500; i++) await sleep(10);
if (!size()) throw new Error("llama.cpp did not print n_vocab");
const every = [...Array(Number(size())).keys()];

const { texts, special, ids } = await json(process.stdin);
console.log(JSON.stringify({
    release: llama.llamaCppRelease.release,
    n_vocab: every.length,
    add_bos: model.tokens.shouldPrependBosToken,
    bos: model.tokens.bos,
    eos: model.tokens.eos,
    eot: model.tokens.eot,
    eog: every.filter((id) => model.isEogToken(id)),
    control: every.filter((id) => model.getTokenAttributes(id).control),
    ids: texts.map((text) => model.tokenize(text, special)),
    texts: ids.map((some) => model.detokenize(some, true)),
}));
await llama.dispose();
