-- Keeps callbacks hidden from other workers while they are being attempted here.
-- KEYS  1 origins zset, then the session hashes
-- ARGV  1 ms for which they stay hidden, then for each session: id, attempt
-- Atomic: an attempt that was settled meanwhile, or taken by another worker, must not be moved. Idempotent.
local until_ms = now_ms() + ARGV[1]
for i = 2, #KEYS do
  local s = redis.call('HMGET', KEYS[i], 'callback', 'open', 'attempt', 'origin')
  if s[1] == 'owed' and s[2] == '1' and s[3] == ARGV[2 * i - 1] then
    owe(KEYS[1], s[4], ARGV[2 * i - 2], until_ms)
  end
end
return 1
